"""Relative entropy between the marginals of neighbouring noise levels, KL(p_from || p_t), with its uncertainty."""

__all__ = ["COLUMNS", "ESTIMATORS", "choose_estimator", "kl"]

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from difficulty.datasets import Dataset, load_dataset
from difficulty.errors import InputError, choose
from difficulty.models import TrainedModel, load_model
from difficulty.process import Process, get_process
from difficulty.randomness import check_seed
from difficulty.relative_entropy.estimate import Estimate, Settings
from difficulty.relative_entropy.estimators import ESTIMATORS
from difficulty.relative_entropy.pairs import EXCLUDED_FIRST, Pairs, make_pairs, upper_bound
from difficulty.relative_entropy.sample import make_sample
from difficulty.relative_entropy.unmixing import quiet_unmixing
from difficulty.threads import one_thread

COLUMNS = (
    "t_from", "t", "log_snr", "kl", "se", "ci_low", "ci_high", "kl_reverse", "per_dlogsnr2", "fisher_rao", "i_min",
    "upper_bound", "ratio", "upper_bound_reverse", "ratio_reverse", "estimator", "valid", "reason",
)  # fmt: skip


def kl(
    data: Dataset | str | Path,
    process: Process | str,
    *,
    estimator: str = "auto",
    pairs: Sequence[int] | None = None,
    tasks: int | None = None,
    samples: int = 4000,
    bootstrap: int = 16,
    seed: int = 0,
    model: TrainedModel | str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """KL(p_{t-1} || p_t) for pairs of timesteps, one row each.

    Args:
        data: a data set, its name or its path.
        process: a forward process or its name.
        estimator: a name in ``ESTIMATORS``.
        pairs: the t of the pairs (t-1, t), in 2..T; default all.
        tasks: K coarse intervals, uniform in t, instead of single steps.
        samples: Monte Carlo draws per pair.
        bootstrap: number of refits to halves of the data, from which the error of the fit is judged; half of them
            beyond 24 dimensions, two beyond 1024.
        seed: of every random draw.
        model: for estimator "score", a trained denoiser as ``load_model`` takes it; without one a small one is trained.
        progress: called with (done, total) as the work goes on.

    Returns:
        A table with ``COLUMNS``: kl, se, ci_low, ci_high (90 %), kl_reverse = KL(p_t || p_{t-1}), and the upper bounds
        of both (F7), in nats; ratio and ratio_reverse to these, near 1 where the schedule alone makes the number;
        per_dlogsnr2 = kl per squared step of log-SNR; fisher_rao = sqrt(2 kl), which adds up along t; i_min the
        schedule-free rate per squared step of log noise scale (F5; NaN where only a bracket is known); estimator, valid
        and reason (empty if valid). Of a pair that is not valid, value and interval are the fit's own, which the reason
        objects to.

    Raises:
        InputError: if an argument is out of its range or the data do not suit the estimator.
    """
    if samples < 100:
        raise InputError(f"samples must be at least 100, got {samples}")
    if bootstrap < 2:
        raise InputError(f"bootstrap must be at least 2, got {bootstrap}")
    check_seed(seed)
    run = choose_estimator(estimator, model)
    trained = model if model is None or isinstance(model, TrainedModel) else load_model(model)
    dataset, process = load_dataset(data), get_process(process)
    wanted = make_pairs(process, pairs, tasks)
    inside = np.flatnonzero(wanted.t_from > 0)
    table = pd.DataFrame({"t_from": wanted.t_from, "t": wanted.t}).reindex(columns=list(COLUMNS))
    table["estimator"], table["valid"], table["reason"] = "none", False, EXCLUDED_FIRST
    if len(inside):
        rows = wanted.take(inside)
        report = progress or (lambda done, total: None)
        with one_thread() as threads, quiet_unmixing():
            settings = Settings(samples, bootstrap, seed, report, trained, process, threads)
            table = _fill(table, inside, rows, run(dataset, rows, settings), dataset)
    return table


def choose_estimator(
    name: str, model: TrainedModel | str | Path | None
) -> Callable[[Dataset, Pairs, Settings], Estimate]:
    """The estimator of that name; raises InputError if it is unknown or has no use for the model."""
    run = choose("estimator", name, ESTIMATORS)
    if model is not None and name != "score":
        raise InputError(f"a model serves estimator 'score' only, not {name!r}; leave one of the two away")
    return run


def _fill(table: pd.DataFrame, rows: np.ndarray, pairs: Pairs, found: Estimate, dataset: Dataset) -> pd.DataFrame:
    second_moment = dataset.law.second_moment if dataset.law else make_sample(dataset).second_moment
    bound, back = (upper_bound(pairs, dataset.dim, second_moment, reverse=way) for way in (False, True))
    columns = {
        "log_snr": pairs.log_snr,
        "kl": found.kl,
        "se": found.se,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "kl_reverse": found.kl_reverse,
        "per_dlogsnr2": found.kl / (2.0 * pairs.dtau) ** 2,
        "fisher_rao": np.sqrt(2.0 * found.kl.clip(min=0.0)),
        "i_min": found.i_min,
        "upper_bound": bound,
        "ratio": found.kl / bound,
        "upper_bound_reverse": back,
        "ratio_reverse": found.kl_reverse / back,
        "estimator": found.estimator,
        "valid": found.valid,
        "reason": found.reason,
    }
    filled = pd.DataFrame(columns, index=rows)
    outside: dict[str, Any] = {"estimator": "none", "valid": False, "reason": EXCLUDED_FIRST}
    for name in columns:
        table[name] = filled[name].reindex(table.index, fill_value=outside.get(name, np.nan))
    return table.astype({"valid": bool})
