"""What the commands make of classes and captions: what a run is told, what is asked for, and whether it was obeyed."""

__all__ = [
    "asked_for",
    "chosen_condition",
    "chosen_text",
    "obedience",
    "sentences",
    "summary",
    "told_of",
]

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from training.accuracy import ClassJudge, seen_captions
from training.commands.arguments import warn
from training.conditional import ENCODER_FOLDER, TINY_ENCODER, Captions, Classes, Condition, Conditioning
from training.text import TextEncoder, TextTable, train_text_encoder

Tell = Callable[[str], None]


def chosen_condition(conditional: bool, text_encoder: str | None) -> str:
    """The condition that the options of a run name."""
    if conditional and text_encoder:
        raise InputError("a run is told classes (--conditional) or captions (--text-encoder), not both")
    return "class" if conditional else "text" if text_encoder else "none"


def chosen_text(spec: str, data: Dataset, tell: Tell) -> TextTable:
    """The data's captions embedded by an encoder: tiny, a folder, or a name on the hub."""
    if spec == TINY_ENCODER:
        tell("the tiny text encoder is trained on the data's captions, once for these data")
        return _table(train_text_encoder(data), data, tell)
    return _table(TextEncoder(spec), data, tell)


def told_of(folder: Path, config: dict[str, Any], data: Dataset, moved: str | None) -> Conditioning | None:
    """What a run is told of the samples of a data set; None for an unconditional run."""
    facts = config["condition"]
    if facts is None:
        return None
    if facts["kind"] == "class":
        told = Classes(data)
        known = facts["network"]["classes"]
        if told.classes != known:
            raise InputError(f"{folder} was trained on {known} classes, {data.name!r} has {told.classes}")
        if data.fingerprint == config["data"] and told.facts["labels"] != facts["labels"]:
            warn(f"the labels of {data.name} are not those that {folder} was trained with")
        return told
    return Captions(data, _table(_encoder(folder, facts, moved), data))


def asked_for(
    folder: Path,
    config: dict[str, Any],
    count: int,
    labels: tuple[int, ...],
    prompts: tuple[str, ...],
    moved: str | None,
) -> Condition | None:
    """The condition of the samples to draw, what was asked for repeated in turn; None for an unconditional run."""
    facts = config["condition"]
    kind = facts["kind"] if facts else "none"
    if labels and kind != "class":
        raise InputError("this run was trained without --conditional; it knows no labels")
    if prompts and kind != "text":
        raise InputError("this run was trained without --text-encoder; it knows no captions")
    if kind == "none":
        return None
    if kind == "text":
        if not prompts:
            raise InputError('this run was trained with captions; ask for some with --prompt "..."')
        table = _encoder(folder, facts, moved).table(prompts)
        return table.of([prompts[i % len(prompts)] for i in range(count)])
    classes = facts["network"]["classes"]
    unknown = [label for label in labels if not 0 <= label < classes]
    if unknown:
        raise InputError(f"label {unknown[0]} is none of the run's classes 0..{classes - 1}")
    return torch.tensor(labels or range(classes))[torch.arange(count) % (len(labels) or classes)]


def obedience(
    told: Conditioning | None, data: Dataset, count: int, draw: Callable[..., Tensor]
) -> tuple[Tensor, pd.DataFrame | None]:
    """Samples as the training data have them, and how many are what was asked for.

    Args:
        told: what the run is told, if anything.
        data: with labels, or nothing is said about obedience.
        count: samples, and as many again of the captions that training never saw.
        draw: ``draw(count=..., condition=...)``.

    Returns:
        The samples (of seen captions), and the rows of ``ClassJudge`` with the columns ``captions`` (none, seen,
        unseen) first and ``heldout``, the accuracy of the classifier itself, last; None if nothing can be said.
    """
    if told is None:
        return draw(count=count), None
    if data.labels is None:
        return draw(count=count, condition=told.examples(count)), None
    judge = ClassJudge(data)
    if not isinstance(told, Captions):
        labels = told.examples(count)
        assert isinstance(labels, Tensor)
        drawn = draw(count=count, condition=labels)
        parts = {"none": judge(drawn, labels)}
    else:
        kinds = {"seen": seen_captions(data), "unseen": list(data.unseen_captions)}
        samples, parts = {}, {}
        for kind, pairs in kinds.items():
            if pairs:
                asked = [pairs[i % len(pairs)] for i in range(count)]
                captions = [caption for caption, _ in asked]
                condition = told.text.encoder.table([caption for caption, _ in pairs]).of(captions)
                samples[kind] = draw(count=count, condition=condition)
                parts[kind] = judge(samples[kind], torch.tensor([label for _, label in asked]), captions)
        if "seen" not in samples:
            return draw(count=count, condition=told.examples(count)), None
        drawn = samples["seen"]
    tables = [table.assign(captions=kind) for kind, table in parts.items()]
    found = pd.concat(tables, ignore_index=True).assign(heldout=judge.heldout)
    return drawn, found[["captions", *(name for name in found.columns if name != "captions")]]


def summary(obeyed: pd.DataFrame) -> dict[str, Any]:
    """The accuracies in all and per class, as JSON values; captions one by one are in condition.csv."""
    kept = obeyed[obeyed["group"] != "caption"]
    return {
        "heldout": float(obeyed["heldout"].iloc[0]),
        "accuracy": kept.drop(columns="heldout").to_dict(orient="records"),
    }


def sentences(obeyed: pd.DataFrame) -> list[str]:
    """The same in words."""
    lines = []
    for kind, part in obeyed.groupby("captions", sort=False):
        row = part[part["group"] == "all"].iloc[0]
        what = "class" if kind == "none" else f"{kind} caption"
        lines.append(
            f"{what} obeyed by {row['accuracy']:.1%} [{row['ci_low']:.1%}, {row['ci_high']:.1%}] of {row['samples']} "
            f"samples, judged by a classifier that is right on {row['heldout']:.1%} of held-out data"
        )
        classes = part[part["group"] == "class"]
        each = (f"{r.value} {r.accuracy:.0%} [{r.ci_low:.0%}, {r.ci_high:.0%}]" for r in classes.itertuples())
        lines.append(f"  by class: {', '.join(each)}")
    return lines


def _table(encoder: TextEncoder, data: Dataset, tell: Tell = lambda message: None) -> TextTable:
    if data.trained_captions is None or data.heldout_captions is None:
        raise InputError(f"data set {data.name!r} has no captions; give a folder with a metadata.jsonl")
    return encoder.table([*data.trained_captions, *data.heldout_captions], tell)


def _encoder(folder: Path, facts: dict[str, Any], moved: str | None) -> TextEncoder:
    """The encoder of a run; refuses another one, whose embeddings would mean something else."""
    tiny = facts["encoder"] == TINY_ENCODER
    spec = moved or (str(folder / ENCODER_FOLDER) if tiny else facts["encoder"])
    encoder = TextEncoder(spec)
    if encoder.fingerprint != facts["fingerprint"]:
        raise InputError(f"{spec} is not the text encoder that {folder} was trained with; name it by --text-encoder")
    return encoder
