"""What samples are compared by; the name of the extractor is part of the name of every metric, as in ``fd-pca``.

    pixels      the values themselves
    pca         their first 16 principal components on the data
    digits-cnn  the last hidden layer, (n, 64), of a classifier trained on the digits; 1 x 8 x 8 images in [-1, 1]
    inception   pool features, (n, 2048), of the Inception network of the FID, by torch-fidelity; images whose range of
                values is known. Its weights are read from the file that the environment variable
                DENOISING_DIFFICULTY_INCEPTION names, or from torch.hub's cache; nothing is downloaded

An extractor is made from the reference data, and maps samples (n, *) to float64 features (n, d).
"""

__all__ = ["FEATURES", "Extractor"]

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from difficulty.datasets import load_dataset
from difficulty.distances import Features, pca, pixels
from difficulty.errors import InputError, first_line
from difficulty.process import Array
from training.classifier import trained_classifier

Extractor = Callable[[Tensor], Array]
ValueRange = tuple[float, float] | None

DIGITS_SHAPE = (1, 8, 8)
INCEPTION_VARIABLE = "DENOISING_DIFFICULTY_INCEPTION"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it in torch.hub's cache
INCEPTION_BATCH = 32


def _flat(make: Callable[[Array], Features]) -> "Callable[[Tensor, ValueRange], Extractor]":
    def of_tensors(reference: Tensor, value_range: ValueRange) -> Extractor:
        features = make(reference.flatten(1).double().numpy())
        return lambda samples: features(samples.flatten(1).double().numpy())

    return of_tensors


def _digits_cnn(reference: Tensor, value_range: ValueRange) -> Extractor:
    if tuple(reference.shape[1:]) != DIGITS_SHAPE:
        raise InputError(
            f"features digits-cnn need images of shape {DIGITS_SHAPE} like the digits, got samples of shape "
            f"{tuple(reference.shape[1:])}"
        )
    classifier = trained_classifier(load_dataset("digits"))
    return lambda samples: classifier.features(samples.float()).double().numpy()


def _inception(reference: Tensor, value_range: ValueRange) -> Extractor:
    if reference.ndim != 4 or reference.shape[1] not in (1, 3) or value_range is None:
        raise InputError(
            "features inception need images of 1 or 3 channels whose range of values is known (a built-in image data "
            f"set or a folder of images), got samples of shape {tuple(reference.shape[1:])}"
        )
    network = _inception_network()
    low, high = value_range

    @torch.no_grad()
    def extract(samples: Tensor) -> Array:
        bytes_ = ((samples - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
        images = bytes_.expand(-1, 3, -1, -1)
        return torch.cat([network(part)[0] for part in images.split(INCEPTION_BATCH)]).double().numpy()

    return extract


def _inception_network() -> Any:
    module = _inception_module()
    given = os.environ.get(INCEPTION_VARIABLE)
    path = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise InputError(
            f"features inception need weights, and {path} does not exist; download {module.URL_INCEPTION_V3} and name "
            f"the file in the environment variable {INCEPTION_VARIABLE}"
        )
    try:
        # torch-fidelity unpickles whatever the file holds; this reads tensors only, and refuses anything else before.
        torch.load(path, map_location="cpu", weights_only=True)
        return module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # torch has many kinds for a truncated, foreign or malicious file
        reason = first_line(error)
        raise InputError(f"{path} does not hold the weights of torch-fidelity's Inception ({reason})") from None


def _inception_module() -> ModuleType:
    """torch_fidelity.feature_extractor_inceptionv3, without the rest of its package.

    The package imports torchvision for its other networks and fails where that does not fit torch; Inception needs
    none of it. The module is therefore imported below an empty package of the same name, which is taken away again.
    """
    name = "torch_fidelity.feature_extractor_inceptionv3"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("torch_fidelity")
    if package is None or package.submodule_search_locations is None:
        raise InputError("features inception need torch-fidelity; install denoising-difficulty[fid]")
    hull = ModuleType("torch_fidelity")
    hull.__path__ = list(package.submodule_search_locations)
    sys.modules["torch_fidelity"] = hull
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"features inception cannot use the installed torch-fidelity ({error})") from None
    finally:
        del sys.modules["torch_fidelity"]


FEATURES: Mapping[str, Callable[[Tensor, ValueRange], Extractor]] = {
    "pixels": _flat(pixels),
    "pca": _flat(pca),
    "digits-cnn": _digits_cnn,
    "inception": _inception,
}
