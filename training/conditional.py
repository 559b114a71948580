"""Class-conditional denoisers: the label enters beside log-SNR, and guidance sharpens it when sampling.

    embedding = E(lambda) + L(y),      y = C is the null label of "no class given"

In training the label is replaced by the null label with probability ``label_dropout``, so that one network holds both
the conditional and the unconditional estimate; classifier-free guidance extrapolates between them (Ho & Salimans 2022,
arXiv 2207.12598, eq. 6, where w is our guidance - 1):

    x0 = x0(null) + guidance (x0(y) - x0(null)),      guidance 1: the conditional model itself
"""

__all__ = ["Guided", "LabelledNetwork", "accuracy", "given"]

import copy

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.diffusers_network import DiffusersNetwork
from difficulty.errors import InputError
from difficulty.process import Process


class JointEmbedding(nn.Module):
    """E(lambda) + L(y) of pairs (lambda, y): (B, 2) -> (B, width); L starts at 0."""

    def __init__(self, noise: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.noise, self.label = noise, nn.Embedding(classes + 1, width)
        nn.init.zeros_(self.label.weight)

    def forward(self, pair: Tensor) -> Tensor:
        # Labels travel as float32, which is exact up to 2^24 classes.
        return self.noise(pair[..., 0]) + self.label(pair[..., 1].long())


class LabelledNetwork(nn.Module):
    """A network with labels: ``forward(x, log_snr, labels)``.

    Args:
        network: has an ``embedding`` of log-SNR, as all in ``difficulty.networks`` do, or is a ``DiffusersNetwork``,
            whose model embeds the classes itself.
        classes: number of classes C; label C means that no class is given.

    Raises:
        InputError: if the network has no such embedding, or room for fewer classes.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.network: nn.Module = network
        if isinstance(network, DiffusersNetwork):
            self.convention = network.convention
            if network.null_label < classes:
                name, room = type(network.model).__name__, network.null_label
                raise InputError(f"{name} has room for {room} classes besides the null class, not for {classes}")
            return
        if not isinstance(getattr(network, "embedding", None), nn.Module):
            raise InputError(f"{type(network).__name__} has no embedding of log-SNR that a label could join")
        noise: nn.Module = network.embedding  # type: ignore[assignment]
        width = noise(torch.zeros(1)).shape[-1]
        network.embedding = JointEmbedding(noise, classes, width)

    def forward(self, x: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        """Without labels the unconditional estimate."""
        if labels is None:
            labels = torch.full_like(log_snr, self.classes)
        if isinstance(self.network, DiffusersNetwork):
            own = torch.where(labels == self.classes, self.network.null_label, labels)
            return self.network(x, log_snr, own.long())
        return self.network(x, torch.stack([log_snr, labels.to(log_snr)], -1))


class _Given(nn.Module):
    """A labelled network with its labels filled in."""

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return self.network(x, log_snr, self.labels)


def given(denoiser: Denoiser, labels: Tensor) -> Denoiser:
    """The denoiser of samples with these labels (B,); it shares all weights."""
    bound = copy.copy(denoiser)
    bound._modules = dict(denoiser._modules) | {"network": _Given(denoiser.network, labels)}
    return bound


class Guided:
    """Classifier-free guidance as something that can be sampled.

    Args:
        denoiser: around a ``LabelledNetwork``.
        labels: wanted classes, shape (B,).
        guidance: 1 is the conditional model, more is sharper and less diverse.
    """

    def __init__(self, denoiser: Denoiser, labels: Tensor, guidance: float = 1.0) -> None:
        self.process: Process = denoiser.process
        self.prediction = denoiser.prediction
        self.plain, self.labelled, self.guidance = denoiser, given(denoiser, labels), guidance

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Guided estimate of x0."""
        wanted = self.labelled.x0(x_t, t)
        if self.guidance == 1:
            return wanted
        plain = self.plain.x0(x_t, t)
        return plain + self.guidance * (wanted - plain)


def accuracy(samples: Tensor, labels: Tensor, data: Dataset, level: float = 0.95) -> dict[str, float]:
    """How often a classifier that never saw the model gives samples the class that they were asked for.

    The classifier is a support-vector machine on the flattened training data.

    Returns:
        accuracy with ci_low and ci_high (Wilson), and heldout, its accuracy on held-out data: the ceiling.

    Raises:
        InputError: if the data have no labels.
    """
    from sklearn.svm import SVC

    if data.labels is None or data.heldout_labels is None:
        raise InputError(f"data set {data.name!r} has no labels")
    judge = SVC(gamma="scale").fit(data.train.flatten(1).numpy(), data.labels.numpy())
    correct = judge.predict(samples.flatten(1).numpy()) == labels.numpy()
    interval = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(level, method="wilson")
    return {
        "accuracy": float(np.mean(correct)),
        "ci_low": float(interval.low),
        "ci_high": float(interval.high),
        "heldout": float(judge.score(data.heldout.flatten(1).numpy(), data.heldout_labels.numpy())),
    }
