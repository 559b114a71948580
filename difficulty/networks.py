"""Denoising networks: plain torch modules ``forward(x, log_snr) -> output`` of the shape of x.

The noise level enters as log-SNR, never as t, so that one network serves every process. Siblings: an MLP for vectors
and small images, a small convolutional UNet, and the DiT (Peebles & Xie 2023, arXiv 2212.09748) from tiny to XL. All
start by predicting zero; what a multiple of the input can predict is added outside the network (`denoiser.py`).

UNet and DiT attend to a sequence of tokens after ``attend_to(width)``: ``forward(x, log_snr, context)``.
"""

__all__ = [
    "DIT_SIZES",
    "MLP",
    "NETWORKS",
    "Context",
    "DiT",
    "UNet",
    "build_network",
    "check_network",
    "own_function",
    "recompute_blocks",
]

import functools
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from difficulty.diffusers_network import DiffusersNetwork, diffusers_network
from difficulty.errors import InputError, choose, first_line
from difficulty.randomness import seeded_torch
from difficulty.specs import build

FREQUENCIES = 16
# Beyond +-20 the data or the noise is below float32 resolution; flow matching ends at -inf.
LOG_SNR_LIMIT = 20.0

# Tokens (B, L, width) and where they are no padding, bool (B, L); each sample has at least one.
Context = tuple[Tensor, Tensor]


class NoiseEmbedding(nn.Module):
    """Fourier features of log-SNR followed by two layers: (B,) -> (B, width)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # Periods from 80 (half a turn over the whole range) down to 2 units of log-SNR.
        periods = torch.logspace(math.log10(80.0), math.log10(2.0), FREQUENCIES)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, log_snr: Tensor) -> Tensor:
        angle = log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)[..., None] * self.frequencies
        return self.layers(torch.cat([angle.sin(), angle.cos()], -1))


class CrossAttention(nn.Module):
    """Attention of a sequence (B, N, width) to the tokens of a context, added to it; it starts by adding nothing.

    Args:
        width: of the sequence, divisible by ``heads``.
        context_width: of the tokens, which are brought to unit scale first.
        heads: attention heads.
    """

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(context_width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.project = nn.Linear(width, width)
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        tokens, mask = context
        q = self.query(self.norm(h)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(self.context_norm(tokens)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return h + self.project(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Multilayer perceptron on the flattened sample.

    Args:
        shape: shape of one sample.
        width: hidden units per layer.
        depth: hidden layers.

    Raises:
        InputError: if an option is below 1.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 128, depth: int = 3) -> None:
        super().__init__()
        _check_sizes("mlp", width=width, depth=depth)
        dim = math.prod(shape)
        self.embedding = NoiseEmbedding(width)
        self.first = nn.Linear(dim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        embedding = self.embedding(log_snr)
        h = F.silu(self.first(x.flatten(1)) + embedding)
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.last(h).reshape(x.shape)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm, shifted by the noise embedding."""

    def __init__(self, channels_in: int, channels_out: int, embedding_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(8, channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.shift = nn.Linear(embedding_width, channels_out)
        self.norm2 = nn.GroupNorm(math.gcd(8, channels_out), channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(embedding)[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Small UNet for images of even height and width; attends to a context at its lowest resolution.

    Args:
        shape: (channels, height, width) of one sample.
        width: channels at full resolution; each level down doubles them.
        levels: resolutions; height and width must be divisible by 2^(levels - 1).

    Raises:
        InputError: if an option is below 1, or the samples are not images of a divisible size.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 32, levels: int = 2) -> None:
        super().__init__()
        _check_sizes("unet", width=width, levels=levels)
        channels, height, image_width = _image_shape("unet", shape)
        if height % 2 ** (levels - 1) or image_width % 2 ** (levels - 1):
            raise InputError(f"a unet of {levels} levels needs sides divisible by {2 ** (levels - 1)}, got {shape}")
        widths = [width * 2**level for level in range(levels)]
        self.embedding = NoiseEmbedding(4 * width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(widths[max(level - 1, 0)], widths[level], 4 * width) for level in range(levels)
        )
        self.middle = ResidualBlock(widths[-1], widths[-1], 4 * width)
        self.cross: CrossAttention | None = None
        self.up = nn.ModuleList(
            ResidualBlock(2 * widths[level], widths[max(level - 1, 0)], 4 * width) for level in reversed(range(levels))
        )
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def attend_to(self, context_width: int) -> None:
        """Add cross-attention to tokens of this width (Rombach et al. 2022, arXiv 2112.10752, section 3.3)."""
        width = self.middle.conv2.out_channels
        self.cross = CrossAttention(width, context_width, math.gcd(4, width))

    def forward(self, x: Tensor, log_snr: Tensor, context: Context | None = None) -> Tensor:
        embedding = self.embedding(log_snr)
        h = self.first(x)
        skips = []
        for level, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if level else h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        if self.cross is not None:
            assert context is not None, "a network that attends needs a context"
            h = self.cross(h.flatten(2).transpose(1, 2), context).transpose(1, 2).reshape(h.shape)
        for level, block in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if level else h
            h = block(torch.cat([h, skips.pop()], 1), embedding)
        return self.last(F.silu(self.norm(h)))


class LearnedPositions(nn.Module):
    """Adds a learned vector to every token: (B, tokens, width) -> the same shape."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero modulation (arXiv 2212.09748, figure 3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.cross: CrossAttention | None = None
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor, context: Context | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(embedding))[:, None].chunk(6, -1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.project(attended)
        if self.cross is not None:
            assert context is not None, "a network that attends needs a context"
            x = self.cross(x, context)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


# Width, depth and heads; S to XL as in the paper's table 1, tiny for images of 8x8 to 32x32 pixels on a CPU.
DIT_SIZES: Mapping[str, tuple[int, int, int]] = {
    "tiny": (64, 3, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class DiT(nn.Module):
    """Diffusion transformer on image patches.

    It differs from the paper's in two details: positions are learned, and the last layer does not predict a variance.

    Args:
        shape: (channels, height, width) of one sample.
        width: token width, divisible by ``heads``; None takes that of ``size``, likewise below.
        depth: blocks.
        heads: attention heads.
        patch: side of a patch; must divide height and width.
        size: a name in ``DIT_SIZES``.

    Raises:
        InputError: if the size is unknown, a number is below 1, or the samples are not images of a divisible size.
    """

    recompute = False  # whether blocks are computed again in the backward pass, to save memory

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        patch: int = 2,
        size: str = "tiny",
    ) -> None:
        super().__init__()
        named = choose("size of a dit", size, DIT_SIZES)
        width, depth, heads = (
            default if own is None else own for own, default in zip((width, depth, heads), named, strict=True)
        )
        _check_sizes("dit", width=width, depth=depth, heads=heads, patch=patch)
        channels, height, image_width = _image_shape("dit", shape)
        if height % patch or image_width % patch:
            raise InputError(f"a dit with patches of {patch} needs sides divisible by it, got {shape}")
        if width % heads:
            raise InputError(f"a dit of width {width} cannot be split over {heads} heads")
        self.patch = patch
        self.embedding = NoiseEmbedding(width)
        tokens = (height // patch) * (image_width // patch)
        self.position = LearnedPositions(tokens, width)
        self.first = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, channels * patch**2)
        for parameter in (*self.modulation.parameters(), *self.last.parameters()):
            nn.init.zeros_(parameter)

    def attend_to(self, context_width: int) -> None:
        """Add cross-attention to tokens of this width to every block (Chen et al. 2023, arXiv 2310.00426, figure 4)."""
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            block.cross = CrossAttention(self.first.out_features, context_width, block.heads)

    def forward(self, x: Tensor, log_snr: Tensor, context: Context | None = None) -> Tensor:
        _, _, height, width = x.shape
        embedding = self.embedding(log_snr)
        tokens = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)
        h = self.position(self.first(tokens))
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, embedding, context, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, embedding, context)
        shift, scale = self.modulation(F.silu(embedding))[:, None].chunk(2, -1)
        patches = self.last(self.norm(h) * (1 + scale) + shift).transpose(1, 2)
        return F.pixel_shuffle(patches.unflatten(2, (height // self.patch, width // self.patch)), self.patch)


def _check_sizes(network: str, **sizes: object) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"network {network!r} needs a whole number of at least 1 for {name}, got {value!r}")


def _image_shape(network: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InputError(f"network {network!r} needs images (channels, height, width), got samples of shape {shape}")
    return shape[0], shape[1], shape[2]


NETWORKS: Mapping[str, Callable[..., nn.Module]] = {"mlp": MLP, "unet": UNet, "dit": DiT}
FROM_DIFFUSERS = "diffusers:"
# The paper's names, as in DiT-XL/2.
DIT_NAME = re.compile(r"dit-(\w+?)(?:/(\w+))?(?::(.*))?", re.IGNORECASE)


def build_network(spec: str, shape: tuple[int, ...], seed: int) -> nn.Module:
    """A network by name, with options as in ``mlp:width=256,depth=4``, its initial weights given by the seed.

    Args:
        spec: a name in ``NETWORKS``; a DiT by the paper's name as in ``dit-s/2``; ``diffusers:PATH`` for a model of
            diffusers, PATH being a config.json or a folder of ``save_pretrained``; or ``FILE.py:FACTORY`` for the
            user's own: ``FACTORY(shape)`` must return a torch module with ``forward(x, log_snr)``. The file is
            executed.
        shape: of one sample.
        seed: of the initial weights.

    Raises:
        InputError: if the name or an option is unknown, or the network does not fit the shape.
    """
    file, _, name = spec.rpartition(":")
    network: nn.Module
    with seeded_torch(seed):  # initialisers read torch's global generator
        if spec.startswith(FROM_DIFFUSERS):
            network = diffusers_network(Path(spec.removeprefix(FROM_DIFFUSERS)))
        elif file.endswith(".py"):
            network = _own_network(spec, own_function(Path(file), name), shape)
        else:
            known = {key: _for_shape(factory, shape) for key, factory in NETWORKS.items()}
            network = build("network", _plain(spec), known)
    check_network(network, spec, shape)
    return network.train()  # one that comes with weights is in evaluation mode, without its dropout


def check_network(network: object, name: str, shape: tuple[int, ...]) -> None:
    """Raise InputError unless the object is a torch module to be trained that maps (2, *shape), (2,) to (2, *shape)."""
    if not isinstance(network, nn.Module):
        raise InputError(f"network {name!r} is a {type(network).__name__}; a torch.nn.Module is needed")
    try:
        with torch.no_grad():
            output = network(torch.zeros(2, *shape), torch.zeros(2))
    except Exception as error:  # the user's own code may raise anything
        reason = first_line(error)
        raise InputError(f"network {name!r} cannot take x of shape {(2, *shape)} and log_snr (2,) ({reason})") from None
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found != (2, *shape):
        raise InputError(f"network {name!r} maps x of shape {(2, *shape)} to {found}; it must keep the shape")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError(f"network {name!r} has no parameter that requires a gradient; there is nothing to train")


def recompute_blocks(network: nn.Module, name: str) -> None:
    """Let a network compute its blocks again in the backward pass, for less memory and the same gradient.

    Raises:
        InputError: if it cannot.
    """
    if isinstance(network, DiT):
        network.recompute = True
    elif isinstance(network, DiffusersNetwork) and network.model._supports_gradient_checkpointing:
        network.model.enable_gradient_checkpointing()
    else:
        raise InputError(f"network {name!r} has no gradient checkpointing; a dit has, and most models of diffusers")


def own_function(path: Path, name: str) -> Callable[..., Any]:
    """The function or class ``name`` of the user's Python file, which is executed.

    Raises:
        InputError: if the file or the name does not exist, or the file does not run.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; name something of your own as FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} does not run ({type(error).__name__}: {first_line(error)})") from None
    if not callable(getattr(module, name, None)):
        raise InputError(f"{path} defines no function or class {name!r}")
    return getattr(module, name)


def _own_network(spec: str, factory: Callable[..., Any], shape: tuple[int, ...]) -> Any:
    """What the user's factory makes; `check_network` judges it."""
    try:
        return factory(shape)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{spec} makes no network for {shape} ({reason}); it is called with the shape alone") from None


def _plain(spec: str) -> str:
    """``dit-s/2`` in the form of the other names, ``dit:size=S,patch=2``."""
    match = DIT_NAME.fullmatch(spec)
    if match is None:
        return spec
    size, patch, more = match.groups()
    if patch is None:
        raise InputError(f"network {spec!r} does not say how large its patches are; write dit-{size}/2 for sides of 2")
    size = next((known for known in DIT_SIZES if known.lower() == size.lower()), size)
    return f"dit:size={size},patch={patch}" + (f",{more}" if more else "")


def _for_shape(factory: Callable[..., nn.Module], shape: tuple[int, ...]) -> Callable[..., nn.Module]:
    bound = functools.partial(factory, shape)
    signature = inspect.signature(factory)
    options = [parameter for name, parameter in signature.parameters.items() if name != "shape"]
    bound.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return bound
