"""A classifier of labelled data: its last hidden layer are the features ``digits-cnn``, its answers judge samples.

Two 3x3 convolutions and one hidden layer for images, two hidden layers for vectors; the input is standardised with the
mean and deviation of the training data. It is trained once on the train split and kept in the cache
(`cache.py`); weights, batches and the number of threads are fixed, so that the same data give the same classifier.
"""

__all__ = ["Classifier", "trained_classifier"]

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difficulty.cache import cached_tensors
from difficulty.datasets import Dataset
from difficulty.randomness import stream, torch_generator
from difficulty.records import fingerprint_array
from difficulty.threads import one_thread
from training.streams import BATCH

FEATURES = 64
EPOCHS = 12
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
CHUNK, CHUNK_VALUES = 2048, 2**20  # samples and values of a pass, the fewer of them
VERSION = 1  # of architecture and training; part of the name in the cache


class Classifier(nn.Module):
    """Logits (n, classes) of samples (n, *shape).

    Args:
        shape: of one sample, (C, H, W) or (D,).
        classes: number of classes.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        if len(shape) == 3:
            pooled = (math.ceil(shape[1] / 2), math.ceil(shape[2] / 2))
            self.body = nn.Sequential(
                nn.Conv2d(shape[0], 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(32 * math.prod(pooled), FEATURES), nn.ReLU(),
            )  # fmt: skip
        else:
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(math.prod(shape), 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU()
            )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body((x - self.mean) / self.scale))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, (n, 64)."""
        return torch.cat([self.body((part - self.mean) / self.scale) for part in _chunks(x)])

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The likeliest class, int64 (n,)."""
        return torch.cat([self(part).argmax(1) for part in _chunks(x)])


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, min(CHUNK, CHUNK_VALUES // math.prod(x.shape[1:]))))


def trained_classifier(data: Dataset) -> Classifier:
    """The classifier of a labelled data set, from the cache or trained and cached.

    Raises:
        InputError: if the data have no labels, they are not 0..C-1, or the cache folder cannot be written.
    """
    classes, labels = data.classes, data.labels
    assert labels is not None
    facts = {
        "version": VERSION,
        "samples": fingerprint_array(data.train.numpy()),
        "labels": fingerprint_array(labels.numpy()),
        "classes": classes,  # samples in memory may be of fewer
    }
    classifier = Classifier(data.shape, classes)
    trained = cached_tensors("classifier", facts, lambda: _train(data.train, labels, classes).state_dict())
    classifier.load_state_dict(trained)
    return classifier.eval()


def _train(samples: Tensor, labels: Tensor, classes: int) -> Classifier:
    with one_thread():  # sums are split over threads, and the last bit of every weight with them
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator(0).initial_seed())
            classifier = Classifier(tuple(samples.shape[1:]), classes)
        classifier.mean.copy_(samples.mean())
        classifier.scale.copy_(samples.std().clamp(min=1e-12))
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * math.ceil(len(samples) / BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(EPOCHS):
            order = torch.from_numpy(stream(0, BATCH, epoch, 0).permutation(len(samples)))
            for rows in order.split(BATCH_SIZE):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(classifier(samples[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return classifier
