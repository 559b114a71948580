"""The report of a comparison: what was found, in words and tables, from the CSV files of its folder.

``report.md`` refers to the figures; ``report.html`` holds them. A claim is made only from confirmation seeds: a
comparison that names no exploration says so, and its verdicts are leads.
"""

__all__ = ["write_report"]

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from difficulty.records import read_run, read_table, write_bytes
from training.effects import EFFECT_COLUMNS, arms_without_order

FIGURES = {
    "forest": "Effect of every arm on every metric",
    "learning_curves": "Learning curves against the baseline",
    "task_differences": "Where on the noise axis the arms differ at the end",
    "task_curves": "Where on the noise axis the arms differ over training",
    "exposure": "Exposure",
    "stages": "Stages",
    "samples": "Samples side by side",
}
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ccc;padding:.2em .8em;text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, then a table, then a figure; each may be missing."""

    heading: str
    paragraphs: list[str]
    table: pd.DataFrame | None = None
    figure: Path | None = None


def write_report(folder: Path) -> list[Path]:
    """Write report.md and report.html of a finished comparison.

    Raises:
        InputError: if the folder is not a finished comparison.
    """
    run = read_run(folder, "compare")
    config = run["config"]
    effects = read_table(folder / "effects.csv", EFFECT_COLUMNS)
    sections = [_setting(config, run), _findings(config, effects), _order(folder, config, effects)]
    sections += [_effects(effects), _speed(folder)]
    sections += [
        Section(caption, [], figure=folder / "figures" / f"{name}.png")
        for name, caption in FIGURES.items()
        if (folder / "figures" / f"{name}.png").exists()
    ]
    title = f"Comparison on {config['data']['name']}"
    paths = [folder / "report.md", folder / "report.html"]
    write_bytes(paths[0], _markdown(title, sections, folder).encode())
    write_bytes(paths[1], _html(title, sections).encode())
    return paths


def percent(log_ratio: float) -> str:
    """A log-ratio as a change in percent."""
    return f"{100 * np.expm1(log_ratio):+.2f} %"


def _setting(config: dict[str, Any], run: dict[str, Any]) -> Section:
    plan, seeds = config["plan"], config["seeds"]
    confirmed = config.get("confirms")
    claim = (
        f"Confirmation: the seeds differ from those of the exploration it names (run.json {confirmed[:12]})."
        if confirmed
        else "Exploration: no claim rests on these seeds. Confirm with other seeds, naming this folder."
    )
    said = f"{len(seeds)} paired seeds ({seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else f"one seed ({seeds[0]})"
    return Section(
        "Setting",
        [
            f"{len(config['arms'])} arms, {said}, {plan['steps']} "
            f"iterations each of {plan['batch']} samples; process {config['process']['name']} with T = "
            f"{config['process']['T']}, network {plan['network']}, prediction {plan['prediction']}, learning rate "
            f"{plan['lr']:g} ({' and '.join(config['lr_schedules'])}); {config['samples']} samples judged per run; "
            f"{run['wall_seconds']:.0f} s.",
            "Arms of one seed share initial weights, data order, noise, the uniform number behind every t, and the "
            "noise of the sampler.",
            claim,
        ],
    )


def _findings(config: dict[str, Any], effects: pd.DataFrame) -> Section:
    baseline = next(iter(config["arms"]))
    sentences = []
    for (arm, schedule), rows in effects.groupby(["arm", "lr_schedule"], sort=False):
        shown = rows["verdict"].str.startswith(("helps", "hurts"))
        parts = [f"{row['metric']} {_in_words(row)}" for row in rows[shown].to_dict("records")]
        for verdict, others in rows[~shown].groupby("verdict", sort=False):
            parts.append(f"{verdict}: {', '.join(others['metric'])}")
        sentences.append(f"**{arm}** against {baseline}, learning rate {schedule}: {'; '.join(parts)}.")
    return Section("What was found", sentences)


def _in_words(row: dict[Any, Any]) -> str:
    if np.isnan(row["ci_low"]):
        return f"{percent(row['log_ratio'])} with one seed, no interval"
    interval = f"{percent(row['log_ratio'])} [{percent(row['ci_low'])}, {percent(row['ci_high'])}]"
    if row["verdict"] == "no difference shown":
        return f"no difference shown, {interval} (detectable from {100 * np.expm1(row['mde']):.2f} %)"
    return f"{row['verdict']}, {interval}"


def order_or_exposure(effect: str, order: str, exposure: str) -> str:
    """What makes an effect, from three verdicts.

    Args:
        effect: of the curriculum against the baseline.
        order: of the curriculum against its own histogram of t without order.
        exposure: of that histogram against the baseline.
    """
    word = effect.partition(",")[0]
    if word == "one seed":
        return "one seed tells nothing"
    if word not in ("helps", "hurts"):
        return "no difference shown, so there is nothing to explain"
    by_order, by_exposure = (verdict.startswith(word) for verdict in (order, exposure))
    if by_order and by_exposure:
        return f"{word}, by its order and by its exposure"
    if by_order or by_exposure:
        return f"{word}, by its {'order' if by_order else 'exposure'}"
    return f"{word}; whether by order or by exposure these seeds do not tell"


def _order(folder: Path, config: dict[str, Any], effects: pd.DataFrame) -> Section:
    """Whether an effect of the curriculum is one of order: against the arm with the same histogram of t."""
    table = read_table(folder / "order.csv", EFFECT_COLUMNS)
    if table.empty:
        return Section("Order or exposure", ["No arm copies the exposure of another, so this was not asked."])
    copy_of, baseline = arms_without_order(config["arms"]), next(iter(config["arms"]))
    verdicts = {(row["arm"], row["lr_schedule"], row["metric"]): row["verdict"] for row in effects.to_dict("records")}
    sentences = []
    for row in table.to_dict("records"):
        where, copied = (row["lr_schedule"], row["metric"]), copy_of[row["arm"]]
        if baseline in (row["arm"], copied):
            answer = f"one of the two is the baseline, so nothing else is known of {row['arm']} and {copied}"
        else:
            answer = order_or_exposure(verdicts[row["arm"], *where], row["verdict"], verdicts[copied, *where])
        sentences.append(
            f"{row['arm']}, {row['metric']}, learning rate {row['lr_schedule']}: {answer} (against its own histogram "
            f"of t without order: {_in_words(row)})."
        )
    return Section("Order or exposure", sentences)


def _effects(effects: pd.DataFrame) -> Section:
    table = effects[["arm", "lr_schedule", "metric", "seeds"]].rename(columns={"lr_schedule": "learning rate"})
    for name, heading in (("log_ratio", "change"), ("ci_low", "from"), ("ci_high", "to")):
        table[heading] = ["" if np.isnan(value) else percent(value) for value in effects[name]]
    for name, heading in (("p", "p"), ("p_holm", "p (Holm)")):
        table[heading] = ["" if np.isnan(value) else f"{value:.3g}" for value in effects[name]]
    table["detectable"] = ["" if np.isnan(value) else f"{100 * np.expm1(value):.2f} %" for value in effects["mde"]]
    if effects["noise_floor"].notna().any():
        table["A/A half width"] = [f"{100 * np.expm1(value):.2f} %" for value in effects["noise_floor"]]
    table["verdict"] = effects["verdict"]
    said = (
        "Negative is better. Intervals are 95 %, paired over seeds, each for itself; verdicts follow p after Holm's "
        "correction over the table. Detectable: found with probability 80 % at this spread by a test of it alone, "
        "without that correction."
        if effects["ci_low"].notna().any()
        else "Negative is lower, by chance or not: of one seed there are no intervals and no verdicts."
    )
    return Section("Effects", [said], table)


def _speed(folder: Path) -> Section:
    speed = read_table(folder / "speed.csv", ("arm", "lr_schedule", "seed", "share", "censored"))
    rows = []
    for (arm, schedule), runs in speed.groupby(["arm", "lr_schedule"], sort=False):
        share = 100 * runs["share"]
        reached = f"{int((~runs['censored']).sum())} of {len(runs)}"
        rows.append((arm, schedule, f"{share.median():.0f} %", f"{share.min():.0f} % to {share.max():.0f} %", reached))
    headings = ["arm", "learning rate", "median share of the iterations", "over the seeds", "seeds that reached it"]
    table = pd.DataFrame(rows, columns=headings)
    return Section(
        "Iterations to the baseline's final held-out nats",
        [
            "Each against the baseline of its own seed and learning rate. A seed that did not reach it counts with the "
            "whole run, so that the median is a lower bound there."
        ],
        table,
    )


def _markdown(title: str, sections: list[Section], folder: Path) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.heading}", ""]
        for paragraph in section.paragraphs:
            lines += [paragraph, ""]
        if section.table is not None:
            columns = list(section.table.columns)
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(map(str, row)) + " |" for row in section.table.to_numpy()]
            lines.append("")
        if section.figure is not None:
            lines += [f"![{section.heading}]({section.figure.relative_to(folder).as_posix()})", ""]
    return "\n".join(lines)


def _html(title: str, sections: list[Section]) -> str:
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{html.escape(title)}</h1>")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        parts += [f"<p>{_bold(html.escape(paragraph))}</p>" for paragraph in section.paragraphs]
        if section.table is not None:
            parts.append(section.table.to_html(index=False, border=0))
        if section.figure is not None:
            data = base64.b64encode(section.figure.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(section.heading)}" src="data:image/png;base64,{data}">')
    return "\n".join(parts) + "\n"


def _bold(text: str) -> str:
    pieces = text.split("**")
    return "".join(f"<b>{piece}</b>" if number % 2 else piece for number, piece in enumerate(pieces))
