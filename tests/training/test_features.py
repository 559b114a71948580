"""Feature extractors. Inception: against a stand-in with torch-fidelity's signature and its failing import of
torchvision; and against the network of torch-fidelity itself with random weights, where that package is installed."""

import importlib.util
import os
import sys
import textwrap

import pytest
import torch

from difficulty.datasets import load_dataset, split_samples
from difficulty.errors import InputError
from training import features
from training.classifier import trained_classifier
from training.features import FEATURES, INCEPTION_VARIABLE
from training.metrics import SampleJudge

IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(folder, monkeypatch):
    monkeypatch.setenv("DENOISING_DIFFICULTY_CACHE", str(folder))
    return folder


def test_digits_classifier_is_trained_once_and_is_the_same_again(cache, monkeypatch):
    data = load_dataset("digits")
    first = trained_classifier(data)
    right = (first.predict(data.heldout) == data.heldout_labels).double().mean()
    assert right > 0.97
    (file,) = cache.glob("classifier-*")
    monkeypatch.setattr("training.classifier._train", None)  # read from the cache, or an error
    assert torch.equal(trained_classifier(data).features(data.heldout), first.features(data.heldout))
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setenv("DENOISING_DIFFICULTY_CACHE", str(cache))
    again = trained_classifier(data)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_classifier_of_vectors_and_of_unlabelled_data(cache, gaussian):
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    data = split_samples("halves", x.numpy(), labels=(x[:, 0] > 0).long().numpy())
    right = (trained_classifier(data).predict(data.heldout) == data.heldout_labels).double().mean()
    assert right > 0.9
    with pytest.raises(InputError, match="no labels"):
        trained_classifier(gaussian)


def test_digits_cnn_tells_a_missing_class_from_all_classes_better_than_chance(cache):
    data = load_dataset("digits")
    judge = SampleJudge(data.train, ("fd-digits-cnn", "recall-digits-cnn"))
    assert judge.reference["digits-cnn"].shape == (len(data.train), 64)
    whole = judge.evaluate(data.heldout)
    without = judge.evaluate(data.heldout[data.heldout_labels != 3])
    assert without["fd-digits-cnn"].ci_low > whole["fd-digits-cnn"].ci_high
    assert without["recall-digits-cnn"].value < whole["recall-digits-cnn"].value


def test_digits_cnn_refuses_other_images():
    with pytest.raises(InputError, match=r"shape \(1, 8, 8\)"):
        FEATURES["digits-cnn"](IMAGES, (-1.0, 1.0))


STAND_IN = '''
import torch
URL_INCEPTION_V3 = "https://example.org/weights.pth"

class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__()
        assert features_list == ["2048"]
        self.layer = torch.nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.dim() == 4 and x.shape[1] == 3
        return (self.layer(x.float().mean((2, 3))),)
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package torch_fidelity whose own import fails as torchvision's does, and a file of weights for it."""
    folder = tmp_path / "site" / "torch_fidelity"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (folder / "feature_extractor_inceptionv3.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.syspath_prepend(folder.parent)
    torch.manual_seed(0)
    torch.save({f"layer.{k}": v for k, v in torch.nn.Linear(3, 2048).state_dict().items()}, tmp_path / "weights.pth")
    monkeypatch.setenv(INCEPTION_VARIABLE, str(tmp_path / "weights.pth"))
    known = {name for name in sys.modules if name.startswith("torch_fidelity")}
    for name in known:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path / "weights.pth"
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]


def test_inception_is_given_bytes_in_three_channels(stand_in):
    layer = torch.nn.Linear(3, 2048)
    layer.load_state_dict({k.removeprefix("layer."): v for k, v in torch.load(stand_in).items()})
    found = FEATURES["inception"](IMAGES, (-1.0, 1.0))(IMAGES)
    expected = layer(((IMAGES + 1) * 127.5).round().mean((2, 3)))
    assert torch.allclose(torch.from_numpy(found), expected.double(), atol=1e-4)
    grey = IMAGES[:, :1]
    assert FEATURES["inception"](grey, (-1.0, 1.0))(grey).shape == (2, 2048)
    assert "torch_fidelity" not in sys.modules


def test_inception_without_weights_without_range_and_with_other_files_says_one_sentence(stand_in, monkeypatch):
    with pytest.raises(InputError, match="range of values"):
        FEATURES["inception"](IMAGES, None)
    with pytest.raises(InputError, match="range of values"):
        FEATURES["inception"](torch.zeros(4, 7), (-1.0, 1.0))
    stand_in.write_bytes(stand_in.read_bytes()[:500])
    with pytest.raises(InputError, match="does not hold the weights"):
        FEATURES["inception"](IMAGES, (-1.0, 1.0))
    torch.save({"layer.weight": os.system}, stand_in)  # a pickle that could run anything
    with pytest.raises(InputError, match="does not hold the weights"):
        FEATURES["inception"](IMAGES, (-1.0, 1.0))
    monkeypatch.setenv(INCEPTION_VARIABLE, str(stand_in.parent / "missing.pth"))
    with pytest.raises(InputError, match=r"missing.pth does not exist; download https://example.org"):
        FEATURES["inception"](IMAGES, (-1.0, 1.0))


def test_inception_without_torch_fidelity_says_what_to_install(monkeypatch):
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(InputError, match=r"install denoising-difficulty\[fid\]"):
        FEATURES["inception"](IMAGES, (-1.0, 1.0))


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_network_of_torch_fidelity_is_loaded_without_torchvision(tmp_path, monkeypatch):
    module = features._inception_module()
    with monkeypatch.context() as patched:  # its constructor wants weights, which are made here
        patched.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), tmp_path / "random.pth")
    monkeypatch.setenv(INCEPTION_VARIABLE, str(tmp_path / "random.pth"))
    found = FEATURES["inception"](IMAGES, (-1.0, 1.0))(IMAGES)
    (expected,) = network(((IMAGES + 1) * 127.5).round().to(torch.uint8))
    assert found.shape == (2, 2048)
    assert torch.allclose(torch.from_numpy(found), expected.double())
