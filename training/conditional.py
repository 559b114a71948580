"""Conditional denoisers: a class or a caption enters beside log-SNR, and guidance sharpens it when sampling.

    class      embedding = E(lambda) + L(y),      y = C is the null label of "no class given"
    text       embedding = E(lambda) + P(pooled embedding of the caption), and UNet and DiT attend to its tokens as well
               (Nichol et al. 2022, arXiv 2112.10741, section 2.3); the null caption is the empty one

In training the condition is replaced by the null one with probability ``condition_dropout``, so that one network holds
both the conditional and the unconditional estimate; classifier-free guidance extrapolates between them (Ho & Salimans
2022, arXiv 2207.12598, eq. 6, where w is our guidance - 1):

    x0 = x0(null) + guidance (x0(y) - x0(null)),      guidance 1: the conditional model itself

A ``Conditioning`` makes conditions of rows of a data set; a ``ConditionalNetwork`` takes them. Siblings have one name.
"""

__all__ = [
    "CONDITIONS",
    "Captions",
    "Classes",
    "Condition",
    "ConditionalNetwork",
    "Conditioning",
    "Guided",
    "LabelledNetwork",
    "TextNetwork",
    "conditional_network",
    "conditioning",
    "given",
]

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.diffusers_network import DiffusersNetwork
from difficulty.errors import InputError, choose
from difficulty.process import Process
from difficulty.randomness import seeded_torch
from difficulty.records import digest, fingerprint_array
from training.streams import CONDITION
from training.text import Text, TextTable

Condition = Tensor | Text  # labels (B,), or embedded captions
TINY_ENCODER = "tiny"  # trained on the data of the run
ENCODER_FOLDER = "text-encoder"  # in the folder of a run whose encoder was trained for it


class ConditionalNetwork(nn.Module, ABC):
    """A network with a condition: ``forward(x, log_snr, condition)``.

    Args:
        network: has an ``embedding`` of log-SNR, as all in ``difficulty.networks`` do, or is a ``DiffusersNetwork``,
            whose model takes the condition itself.

    Raises:
        InputError: if the network has no such embedding.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: nn.Module = network
        if isinstance(network, DiffusersNetwork):
            self.convention = network.convention
        elif not isinstance(getattr(network, "embedding", None), nn.Module):
            raise InputError(f"{type(network).__name__} has no embedding of log-SNR that a condition could join")

    def join(self, part: nn.Module) -> None:
        """Add a part to the network's embedding; see ``JointEmbedding``."""
        noise: nn.Module = self.network.embedding  # type: ignore[assignment]
        self.network.embedding = JointEmbedding(noise, part)

    @property
    def width(self) -> int:
        """Width of the network's embedding."""
        return self.network.embedding(torch.zeros(1)).shape[-1]  # type: ignore[operator]

    @abstractmethod
    def forward(self, x: Tensor, log_snr: Tensor, condition: Any = None) -> Tensor:
        """The output, shape of x; without a condition the unconditional one."""


class JointEmbedding(nn.Module):
    """E(lambda) + part(c) of rows (lambda, c): (B, 1 + n) -> (B, width); the part starts at 0."""

    def __init__(self, noise: nn.Module, part: nn.Module) -> None:
        super().__init__()
        self.noise, self.part = noise, part

    def forward(self, joint: Tensor) -> Tensor:
        return self.noise(joint[..., 0]) + self.part(joint[..., 1:])


class _LabelEmbedding(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.label = nn.Embedding(classes + 1, width)
        nn.init.zeros_(self.label.weight)

    def forward(self, labels: Tensor) -> Tensor:
        # Labels travel as float32, which is exact up to 2^24 classes.
        return self.label(labels[..., 0].long())


class _PooledEmbedding(nn.Module):
    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(text_width), nn.Linear(text_width, width)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(self.norm(pooled))


class LabelledNetwork(ConditionalNetwork):
    """A network that is told classes; the condition is labels (B,).

    Args:
        network: see ``ConditionalNetwork``.
        classes: number of classes C; label C means that no class is given.

    Raises:
        InputError: if a model of diffusers has room for fewer classes.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__(network)
        self.classes = classes
        if not isinstance(network, DiffusersNetwork):
            self.join(_LabelEmbedding(classes, self.width))
        elif network.null_label < classes:
            name, room = type(network.model).__name__, network.null_label
            raise InputError(f"{name} has room for {room} classes besides the null class, not for {classes}")

    def forward(self, x: Tensor, log_snr: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            condition = torch.full_like(log_snr, self.classes)
        if isinstance(self.network, DiffusersNetwork):
            own = torch.where(condition == self.classes, self.network.null_label, condition)
            return self.network(x, log_snr, own.long())
        return self.network(x, torch.stack([log_snr, condition.to(log_snr)], -1))


class TextNetwork(ConditionalNetwork):
    """A network that is told captions; the condition is a ``Text``.

    Args:
        network: see ``ConditionalNetwork``; one with ``attend_to(width)`` attends to the tokens, any other (the MLP)
            has the pooled embedding alone.
        width: of the embeddings.
        null_tokens: length of the null caption, whose embedding is part of the weights.

    Raises:
        InputError: if a model of diffusers takes no text, or text of another width.
    """

    null_text: Tensor
    null_mask: Tensor
    null_pooled: Tensor

    def __init__(self, network: nn.Module, width: int, null_tokens: int) -> None:
        super().__init__(network)
        self.attends = hasattr(network, "attend_to")
        if isinstance(network, DiffusersNetwork):
            network.check_text_width(width)
        else:
            self.join(_PooledEmbedding(width, self.width))
            if self.attends:
                network.attend_to(width)  # type: ignore[operator]
        self.register_buffer("null_text", torch.zeros(1, null_tokens, width))
        self.register_buffer("null_mask", torch.ones(1, null_tokens, dtype=torch.bool))
        self.register_buffer("null_pooled", torch.zeros(1, width))

    def set_null(self, null: Text) -> None:
        """Take the embedding of the null caption, a batch of one."""
        for name, value in (("text", null.tokens), ("mask", null.mask), ("pooled", null.pooled)):
            getattr(self, f"null_{name}").copy_(value)

    def forward(self, x: Tensor, log_snr: Tensor, condition: Text | None = None) -> Tensor:
        if condition is None:
            null = (self.null_text, self.null_mask, self.null_pooled)
            condition = Text(*(part.expand(len(x), *part.shape[1:]) for part in null))
        if isinstance(self.network, DiffusersNetwork):
            # As many tokens as in training: some of these models know no mask.
            told = condition.padded(self.null_text.shape[1])
            return self.network(x, log_snr, text=(told.tokens, told.mask, told.pooled))
        joint = torch.cat([log_snr[..., None], condition.pooled], -1)
        if self.attends:
            return self.network(x, joint, (condition.tokens, condition.mask))
        return self.network(x, joint)


def is_null_caption(name: str) -> bool:
    """Whether a weight of that name is the embedding of the null caption, which comes with the captions."""
    return name.rpartition(".")[2] in ("null_text", "null_mask", "null_pooled")


NETWORKS: Mapping[str, type[ConditionalNetwork]] = {"class": LabelledNetwork, "text": TextNetwork}


def conditional_network(network: nn.Module, facts: Mapping[str, Any], seed: int = 0) -> ConditionalNetwork:
    """A network with the condition of a run.

    Args:
        network: see ``ConditionalNetwork``.
        facts: ``Conditioning.facts``.
        seed: of the initial weights that are added.
    """
    with seeded_torch(seed, CONDITION, 0, 0):
        return NETWORKS[facts["kind"]](network, **facts["network"])


class Conditioning(ABC):
    """What a network is told about the samples of a data set.

    Attributes:
        facts: kind, options of the network and provenance, as JSON values; part of a run's settings.
    """

    facts: dict[str, Any]

    def network(self, network: nn.Module, seed: int) -> ConditionalNetwork:
        """The network with this condition."""
        return conditional_network(network, self.facts, seed)

    @abstractmethod
    def train(self, rows: Tensor, dropped: Tensor) -> Condition:
        """Conditions of train samples by row (B,), the null condition where ``dropped`` (B,) is true."""

    @abstractmethod
    def heldout(self, rows: Tensor) -> Condition:
        """Conditions of held-out samples by row (B,)."""

    @abstractmethod
    def examples(self, count: int) -> Condition:
        """Conditions to sample from, all of them in turn."""

    def save(self, folder: Path) -> None:  # noqa: B027 - there is nothing to write for most
        """Write to the folder of a run what sampling needs besides the weights."""


class Classes(Conditioning):
    """Labels.

    Raises:
        InputError: if the data set has none, or they are not 0..C-1 with train samples each.
    """

    def __init__(self, data: Dataset, text: TextTable | None = None) -> None:
        self.classes = data.classes
        labels = data.trained_labels
        assert labels is not None
        assert data.heldout_labels is not None
        self.labels, self.heldout_labels = labels, data.heldout_labels
        given = fingerprint_array(torch.cat([labels, data.heldout_labels]).numpy())["sha256"]
        self.facts = {"kind": "class", "network": {"classes": self.classes}, "labels": given}

    def train(self, rows: Tensor, dropped: Tensor) -> Tensor:
        return torch.where(dropped, self.classes, self.labels[rows])

    def heldout(self, rows: Tensor) -> Tensor:
        return self.heldout_labels[rows]

    def examples(self, count: int) -> Tensor:
        return torch.arange(count) % self.classes


class Captions(Conditioning):
    """Captions, embedded by a frozen encoder.

    Args:
        data: with captions.
        text: holds every caption of the data.

    Raises:
        InputError: if the data set has no captions, or they were not embedded.
    """

    def __init__(self, data: Dataset, text: TextTable | None = None) -> None:
        if data.captions is None or data.heldout_captions is None:
            raise InputError(f"data set {data.name!r} has no captions; give a folder with a metadata.jsonl")
        if text is None:
            raise InputError("captions need a text encoder; name one with --text-encoder")
        self.text = text
        self.rows, self.heldout_rows = text.rows(data.trained_captions or ()), text.rows(data.heldout_captions)
        self.facts = {
            "kind": "text",
            "network": {"width": text.text.pooled.shape[1], "null_tokens": text.text.tokens.shape[1]},
            "encoder": TINY_ENCODER if text.encoder.trained else text.encoder.spec,
            "fingerprint": text.encoder.fingerprint,
            "captions": digest({"given": [list(data.trained_captions or ()), list(data.heldout_captions)]}),
        }

    def network(self, network: nn.Module, seed: int) -> ConditionalNetwork:
        wrapped = super().network(network, seed)
        assert isinstance(wrapped, TextNetwork)
        wrapped.set_null(self.text.text[:1])
        return wrapped

    def train(self, rows: Tensor, dropped: Tensor) -> Text:
        return self.text.text[torch.where(dropped, 0, self.rows[rows])]  # row 0 is the empty caption

    def heldout(self, rows: Tensor) -> Text:
        return self.text.text[self.heldout_rows[rows]]

    def examples(self, count: int) -> Text:
        different = self.rows.unique()
        return self.text.text[different[torch.arange(count) % len(different)]]

    def save(self, folder: Path) -> None:
        """Keep an encoder that was trained for the run with it."""
        if self.text.encoder.trained and not (folder / ENCODER_FOLDER).is_dir():
            self.text.encoder.copy(folder / ENCODER_FOLDER)


CONDITIONS: Mapping[str, type[Classes] | type[Captions] | None] = {"none": None, "class": Classes, "text": Captions}


def conditioning(name: str, data: Dataset, text: TextTable | None = None) -> Conditioning | None:
    """The conditioning by name; None for ``none``.

    Raises:
        InputError: if the name is unknown, or the data have no such condition.
    """
    kind = choose("condition", name, CONDITIONS)
    return kind(data, text) if kind else None


class _Given(nn.Module):
    """A conditional network with its condition filled in."""

    def __init__(self, network: nn.Module, condition: Condition) -> None:
        super().__init__()
        self.network, self.condition = network, condition

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return self.network(x, log_snr, self.condition)


def given(denoiser: Denoiser, condition: Condition) -> Denoiser:
    """The denoiser of samples with this condition, a row each; it shares all weights."""
    bound = copy.copy(denoiser)
    bound._modules = dict(denoiser._modules) | {"network": _Given(denoiser.network, condition)}
    return bound


class Guided:
    """Classifier-free guidance as something that can be sampled.

    Args:
        denoiser: around a ``ConditionalNetwork``.
        condition: what is wanted, a row per sample.
        guidance: 1 is the conditional model, more is sharper and less diverse.
    """

    def __init__(self, denoiser: Denoiser, condition: Condition, guidance: float = 1.0) -> None:
        self.process: Process = denoiser.process
        self.prediction = denoiser.prediction
        self.plain, self.told, self.guidance = denoiser, given(denoiser, condition), guidance

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Guided estimate of x0."""
        wanted = self.told.x0(x_t, t)
        if self.guidance == 1:
            return wanted
        plain = self.plain.x0(x_t, t)
        return plain + self.guidance * (wanted - plain)
