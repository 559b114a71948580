"""How often samples are what was asked for, judged by a classifier that never saw the model.

The classifier (`classifier.py`) learned from the training data; its own accuracy on held-out data is the ceiling of
what can be shown. Intervals are Wilson's for a proportion, per class and per caption as well as in all.
"""

__all__ = ["ClassJudge", "seen_captions"]

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from training.classifier import trained_classifier
from training.effects import LEVEL

COLUMNS = ("group", "value", "label", "samples", "accuracy", "ci_low", "ci_high")


class ClassJudge:
    """A classifier of samples.

    Args:
        data: with labels.
        level: of the intervals.

    Raises:
        InputError: if the data have no labels.
    """

    def __init__(self, data: Dataset, level: float = LEVEL) -> None:
        self.level = level
        self.judge = trained_classifier(data)
        assert data.heldout_labels is not None
        self.heldout = float((self.judge.predict(data.heldout) == data.heldout_labels).double().mean())

    def __call__(self, samples: Tensor, labels: Tensor, captions: Sequence[str] | None = None) -> pd.DataFrame:
        """Accuracy on samples (n, *) of which classes ``labels`` (n,) were asked for, by ``captions`` (n,) if by any.

        A sample that holds NaN or infinity is of no class.

        Returns:
            group (all, class, caption), value, label, samples, accuracy, ci_low, ci_high; a row per group and value.
        """
        wanted = labels.numpy()
        finite = samples.flatten(1).isfinite().all(1).numpy()
        obeyed = finite & (self.judge.predict(samples).numpy() == wanted)
        rows = [self._row("all", "", -1, obeyed)]
        rows += [self._row("class", str(k), k, obeyed[wanted == k]) for k in np.unique(wanted).tolist()]
        if captions is not None:
            told = np.array(captions)
            for caption in dict.fromkeys(captions):
                mine = told == caption
                rows.append(self._row("caption", caption, int(wanted[mine][0]), obeyed[mine]))
        return pd.DataFrame(rows, columns=COLUMNS)

    def _row(self, group: str, value: str, label: int, obeyed: npt.NDArray[np.bool_]) -> tuple[object, ...]:
        found = stats.binomtest(int(obeyed.sum()), len(obeyed)).proportion_ci(self.level, method="wilson")
        return group, value, label, len(obeyed), float(obeyed.mean()), float(found.low), float(found.high)


def seen_captions(data: Dataset) -> list[tuple[str, int]]:
    """The different captions of the train samples, each with the class that it names; sorted.

    A caption that samples of several classes share names none and is left out.

    Raises:
        InputError: if the data have no captions or no labels.
    """
    if data.captions is None or data.labels is None:
        raise InputError(f"data set {data.name!r} lacks captions or labels; nothing says which class a caption names")
    pairs = set(zip(data.captions, data.labels.tolist(), strict=True))
    times = Counter(caption for caption, _ in pairs)
    return sorted(pair for pair in pairs if times[pair[0]] == 1)
