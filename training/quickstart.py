"""The whole path on one data set in a few minutes: measure, rank, cluster, train in pairs, compare, say what was found.

The folder holds ``measurement/`` (see `difficulty.measurement`), ``curriculum.json``, ``comparison/`` (see
`compare.py`) and ``summary.txt``, the lines that end the command.
"""

__all__ = ["QuickstartPlan", "quickstart", "summarise"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from difficulty.datasets import Dataset, load_dataset
from difficulty.expert_plan import ExpertPlan
from difficulty.measurement import measure
from difficulty.plots import plot_folder
from difficulty.process import get_process
from difficulty.ranking import MeasureRanking, Ranking, RankingTask
from difficulty.records import read_table, write_bytes
from difficulty.tasks import runs
from training.arms import STAGE_LENGTH_IN_TAU
from training.compare import compare
from training.curriculum import Curriculum
from training.curriculum_builders import make_curriculum
from training.metrics import check_enough
from training.plots import draw_folder
from training.report import write_report

ARMS = ("vanilla", "vanilla-again", "curriculum", "anti")
CLUSTERS = 5
CURRICULUM_SHARE = 0.1  # of the steps, for all stages before the last together
MEASURE, OTHER_MEASURE = "excess_nats", "relative_entropy"
NAMED = 3  # how many of the hardest and easiest tasks the summary names

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuickstartPlan:
    """How long the quickstart works.

    Args:
        process: forward process by name.
        tasks: number of tasks.
        expert_seeds, expert_budget: of the measurement, as in ``ExpertPlan``.
        compare_seeds: paired seeds of the comparison, at least 2.
        steps: iterations of every run of the comparison.
        network: of experts and runs.
        device, workers: torch device and processes of the comparison.
    """

    process: str = "vp-linear"
    tasks: int = 20
    expert_seeds: int = 3
    expert_budget: int = 600
    compare_seeds: int = 6
    steps: int = 2000
    network: str = "mlp"
    device: str = "cpu"
    workers: int = 1


def quickstart(
    data: str | Path | Dataset, out: Path, plan: QuickstartPlan | None = None, progress: Progress | None = None
) -> list[str]:
    """Run the whole path and return the lines that say what was found.

    Args:
        data: see ``load_dataset``.
        out: folder to write; an interrupted run goes on where it stopped.
        plan: how long to work.
        progress: called with (stage, done, in all).

    Raises:
        InputError: if the data or the plan cannot be used, or the folder holds another run.
    """
    plan = plan or QuickstartPlan()
    dataset, process = load_dataset(data), get_process(plan.process)
    check_enough("data", len(dataset.train))  # of the comparison, before anything is measured
    experts = ExpertPlan(network=plan.network, seeds=tuple(range(plan.expert_seeds)), budget=plan.expert_budget)
    found = measure(dataset, process, out=out / "measurement", tasks=plan.tasks, plan=experts, progress=progress)
    plot_folder(out / "measurement")
    k = min(CLUSTERS, plan.tasks)
    tau = max(1, round(CURRICULUM_SHARE * plan.steps / max(k - 1, 1) / STAGE_LENGTH_IN_TAU))
    curriculum = make_curriculum(
        found.ranking, method="kmeans", k=k, measure=MEASURE, pacing="patience", pacing_options={"tau": tau},
        process=process,
    )  # fmt: skip
    curriculum.save(out / "curriculum.json")
    compare(
        dataset,
        process,
        ARMS,
        curriculum=curriculum,
        seeds=range(plan.compare_seeds),
        steps=plan.steps,
        out=out / "comparison",
        network=plan.network,
        device=plan.device,
        workers=plan.workers,
        progress=None if progress is None else lambda _, done, total: progress("paired runs", done, total),
    )
    draw_folder(out / "comparison")
    write_report(out / "comparison")
    lines = summarise(out, dataset, plan)
    write_bytes(out / "summary.txt", ("\n".join(lines) + "\n").encode())
    return lines


def summarise(out: Path, dataset: Dataset, plan: QuickstartPlan) -> list[str]:
    """The dozen lines at the end, read from the files."""
    ranking = Ranking.load(out / "measurement")
    curriculum = Curriculum.load(out / "curriculum.json")
    effects = read_table(out / "comparison" / "effects.csv")
    chosen = ranking.measures[MEASURE]
    verdict = {sentence.partition(":")[0]: sentence.partition(": ")[2] for sentence in ranking.verdict}
    compared = (f"{MEASURE} and {OTHER_MEASURE} ", f"{MEASURE} is not compared with ")
    agreement = next(sentence for sentence in ranking.verdict if sentence.startswith(compared))
    clusters = " -> ".join(_spans(cluster.tasks, curriculum.tasks) for cluster in curriculum.clusters)
    about = "; ".join(filter(None, [f"{MEASURE}, {chosen.unit}", chosen.note]))
    return [
        f"Data: {dataset.name}, {len(dataset.train)} train and {len(dataset.heldout)} held-out samples of "
        f"{dataset.dim} dimensions; {plan.process}, {len(ranking.tasks)} tasks, {plan.expert_seeds} experts each.",
        f"Hardest to learn ({about}): {_named(chosen, ranking.tasks, chosen.order[::-1])}.",
        f"Easiest: {_named(chosen, ranking.tasks, chosen.order)}.",
        f"By convergence: {verdict[MEASURE]}",
        f"By relative entropy: {verdict[OTHER_MEASURE]}",
        f"Do the two agree? {agreement}",
        f"Curriculum, easy to hard (t): {clusters}.",
        f"{plan.compare_seeds} paired seeds, {plan.steps} iterations, change against uniform t, lower is better "
        "(95 % intervals; verdicts after Holm's correction):",
        *(_effect_line(effects, arm) for arm in ARMS[1:]),
        f"Figures: {out / 'measurement' / 'figures'} and {out / 'comparison' / 'figures'}",
        f"Files: {out / 'measurement' / 'ranking.json'}, {out / 'curriculum.json'}, "
        f"{out / 'comparison' / 'report.html'}",
    ]


def _named(measure: MeasureRanking, tasks: list[RankingTask], order: list[int]) -> str:
    """The first tasks of an order with their values and intervals."""
    parts = []
    for index in order[:NAMED]:
        value, low, high = measure.value[index], measure.ci_low[index], measure.ci_high[index]
        text = "not learned" if value is None else f"{value:.2g} [{_bound(low)}, {_bound(high)}]"
        parts.append(f"t {tasks[index].t_first}..{tasks[index].t_last} {text}")
    return ", ".join(parts)


def _bound(value: float | None) -> str:
    """An end of an interval, which may be open or, of one seed, not known."""
    return "?" if value is None else f"{value:.2g}"


def _spans(members: list[int], tasks: list[RankingTask]) -> str:
    """The timesteps of a cluster, neighbouring tasks joined."""
    return "+".join(f"{tasks[first].t_first}..{tasks[last].t_last}" for first, last in runs(members))


def _effect_line(effects: pd.DataFrame, arm: str) -> str:
    rows = effects[effects["arm"] == arm]
    parts = []
    for row in rows.to_dict("records"):
        change, low, high = (100 * math.expm1(row[name]) for name in ("log_ratio", "ci_low", "ci_high"))
        parts.append(f"{row['metric']} {change:+.1f} % [{low:+.1f}, {high:+.1f}] {row['verdict']}")
    return f"  {arm}: " + "; ".join(parts)
