"""Networks of diffusers as denoising networks here: their models, called by their own conventions.

A diffusers model is given x_t and a timestep and returns the prediction itself, so no baseline is added to it. What it
is given at t depends on the process, as diffusers' schedulers have it:

    alpha + sigma = 1   x_t                           t: sigma times the number of timesteps (flow matching)
    alpha = 1           x_t / sqrt(sigma^2 + sd^2)    0.25 log sigma; Karras et al. 2022, table 1, sd = 0.5
    otherwise           x_t                           t - 1: DDPM's index, counted from 0

A conditional model that is not told its condition gets what stands for none: class models their last class, text models
one token of zeros.
"""

__all__ = ["BACKBONES", "DiffusersNetwork", "diffusers_network", "load_component", "model_folder"]

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difficulty.errors import InputError, first_line
from difficulty.pretrained import weights_variant
from difficulty.process import Array, Process
from difficulty.records import read_json

BACKBONES = ("unet", "transformer")


class DiffusersNetwork(nn.Module):
    """A diffusers model as ``forward(x, timestep)``, with labels where it knows classes, and text where it knows that.

    Args:
        model: a diffusers model whose first two inputs are a sample (B, C, H, W) and a timestep (B,).

    Raises:
        InputError: if the model needs an input for which there is no neutral value.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.null_condition = _null_condition(model)
        for module in model.modules():
            # diffusers drops labels by itself in training, from torch's global generator; here the trainer drops them.
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0

    @property
    def null_label(self) -> int:
        """The label that means that no class is given.

        Raises:
            InputError: if the model knows no classes.
        """
        if "class_labels" not in self.null_condition:
            raise InputError(
                f"{type(self.model).__name__} knows no classes; set num_class_embeds (of a UNet, one more than there "
                "are classes) or num_embeds_ada_norm (of a DiT) in its config.json"
            )
        return int(self.null_condition["class_labels"](1))

    def check_text_width(self, width: int) -> None:
        """Raise InputError unless the model takes embeddings of text of this width."""
        name, null = type(self.model).__name__, self.null_condition.get("encoder_hidden_states")
        if null is None:
            raise InputError(f"{name} takes no text; UNet2DConditionModel and the transformers of text models do")
        pooled = self.null_condition.get("pooled_projections")
        for what, found in (("tokens", null(1).shape[-1]), ("pooled text", pooled(1).shape[-1] if pooled else width)):
            if found != width:
                raise InputError(f"{name} takes {what} of width {found}, but the text encoder gives {width}")

    def convention(self, process: Process, sigma_data: float) -> tuple[Array, Array]:
        """What the model is given at each t: the factor on x_t, and the timestep; each of shape (T+1,).

        Args:
            process: the forward process.
            sigma_data: standard deviation of the data for EDM's input scale, which belongs to alpha = 1.
        """
        ones, t = np.ones(process.T + 1), np.arange(process.T + 1, dtype=np.float64)
        if (process.alpha == 1).all():
            sigma = np.concatenate([process.sigma[1:2], process.sigma[1:]])  # t = 0 is never asked for
            return (sigma**2 + sigma_data**2) ** -0.5, 0.25 * np.log(sigma)
        if np.allclose(process.alpha + process.sigma, 1, rtol=0, atol=1e-9):
            return ones, process.T * process.sigma
        return ones, t - 1

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        labels: Tensor | None = None,
        text: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The prediction, shape of x.

        Args:
            x: shape (B, C, H, W).
            timestep: shape (B,), see ``convention``.
            labels: classes (B,).
            text: tokens (B, L, width), where they are no padding (B, L), and pooled embeddings (B, width).
        """
        arguments = {name: make(len(x)).to(x.device) for name, make in self.null_condition.items()}
        if labels is not None:
            arguments["class_labels"] = labels
        if text is not None:
            arguments["encoder_hidden_states"], mask, pooled = text
            if "encoder_attention_mask" in inspect.signature(self.model.forward).parameters:
                arguments["encoder_attention_mask"] = mask
            if "pooled_projections" in arguments:
                arguments["pooled_projections"] = pooled
        output = self.model(x, timestep=timestep, return_dict=False, **arguments)[0]
        # A model that also learns the variance returns it as a second half of the channels.
        return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output


def diffusers_network(path: Path) -> DiffusersNetwork:
    """A model from a config.json, with fresh weights, or from a folder of ``save_pretrained``, with the weights there.

    Raises:
        InputError: if diffusers is missing, or there is no model of its own.
    """
    if path.is_dir():
        return DiffusersNetwork(load_component(model_folder(path), "config.json"))
    content = read_json(path)
    kind = _class_named_in(content, path)
    try:
        return DiffusersNetwork(kind.from_config(content))
    except InputError:
        raise
    except Exception as error:  # diffusers raises many kinds for settings that do not go together
        raise InputError(f"{path} makes no {kind.__name__} ({first_line(error)})") from None


def model_folder(folder: Path) -> Path:
    """Where the model is in a folder of ``save_pretrained``: the folder, or that of the backbone in a pipeline's."""
    parts = (folder / name for name in BACKBONES)
    return next((part for part in parts if (part / "config.json").exists()), folder)


def load_component(folder: Path, config: str) -> Any:
    """The model (``config.json``) or scheduler (``scheduler_config.json``) that ``save_pretrained`` left in a folder.

    Raises:
        InputError: if diffusers is missing, does not know the class, or cannot load it.
    """
    loader = _class_named_in(read_json(folder / config), folder / config)
    options: dict[str, Any] = {}
    if config == "config.json":
        options = {"use_safetensors": True, "variant": weights_variant(folder)}
    try:
        return loader.from_pretrained(folder, **options)
    except Exception as error:  # diffusers raises many kinds for missing or truncated weights
        reason = first_line(error)
        raise InputError(
            f"cannot load {loader.__name__} from {folder} ({reason}); if files are truncated or missing, save it again"
        ) from None


def _class_named_in(content: Any, source: Path) -> Any:
    try:
        import diffusers
    except ImportError:
        raise InputError(f"{source} needs diffusers; install denoising-difficulty[diffusers]") from None
    name = content.get("_class_name") if isinstance(content, dict) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not hasattr(kind, "from_pretrained"):
        raise InputError(f"{source} names {name!r}, no model or scheduler of diffusers {diffusers.__version__}")
    return kind


def _zeros(width: int, n: int) -> Tensor:
    """One token of zeros for each sample, (n, 1, width)."""
    return torch.zeros(n, 1, width)


def _pooled_zeros(width: int, n: int) -> Tensor:
    return torch.zeros(n, width)


def _labels(label: int, n: int) -> Tensor:
    return torch.full((n,), label, dtype=torch.long)


def _null_condition(model: Any) -> dict[str, Callable[[int], Tensor]]:
    """What a conditional model is given for "no condition": by argument, a function of the batch size."""
    config = model.config
    makers: dict[str, Callable[[int], Tensor]] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name == "class_labels" and config.get("num_embeds_ada_norm"):
            makers[name] = functools.partial(_labels, config["num_embeds_ada_norm"])
        elif name == "class_labels" and config.get("num_class_embeds"):
            makers[name] = functools.partial(_labels, config["num_class_embeds"] - 1)
        elif name == "encoder_hidden_states":
            widths = (config.get(key) for key in ("caption_channels", "joint_attention_dim", "cross_attention_dim"))
            width = next(filter(None, widths), None)
            if width:
                makers[name] = functools.partial(_zeros, width)
        elif name == "pooled_projections" and config.get("pooled_projection_dim"):
            makers[name] = functools.partial(_pooled_zeros, config["pooled_projection_dim"])
        elif (
            parameter.default is inspect.Parameter.empty
            and name not in ("sample", "hidden_states", "timestep")
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ):
            raise InputError(f"{type(model).__name__} needs {name!r}, for which there is no neutral value")
    return makers
