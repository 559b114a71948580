"""Does an order or a density of timesteps help? The studies behind results/comparison, from data to verdict.

Every setting (data, process, prediction) goes through three stages, each of which continues where it stopped:

    measure    experts on 20 tasks of equal width in log-SNR: the difficulty from which curriculum and recipe are made
    explore    all designs of the recipe `measured` on exploration seeds, learning rate annealed
    confirm    the main arms on confirmation seeds, learning rate annealed
    constant   some of them with a constant learning rate, in the settings of which that was claimed to matter
    noise      the noisiest tasks first, whatever was measured, likewise with a constant learning rate

Between exploring and confirming one design is chosen over all settings by a rule that was written down before any of
them was trained (``choose``): a design is admissible if its change of sample quality, the mean over settings and both
sample metrics of the mean log-ratio to plain training, is at most 2 %; of these the one that reaches plain training's
final held-out nats after the smallest share of its iterations, geometric mean over settings, a run that does not reach
it counting as 1; if none is admissible, the one with the least change of sample quality.

    python benchmarks/comparison_studies.py                      everything, about 80 minutes on one core
    python benchmarks/comparison_studies.py --settings grid-2d-linear-eps --stages measure explore confirm
    python benchmarks/comparison_studies.py --smoke --out DIR     the same path in seconds, for the tests
"""

import argparse
import io
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from difficulty.datasets import load_dataset
from difficulty.experts import ExpertPlan
from difficulty.measurement import measure
from difficulty.process import get_process
from difficulty.ranking import Ranking
from difficulty.records import write_bytes, write_table
from training.compare import compare
from training.curriculum import make_curriculum
from training.plots import draw_folder
from training.plots_comparison import overview
from training.recipe import DESIGNS
from training.report import write_report
from training.verdicts import verdict_table

SIMPLE = ("log-snr", "min-snr", "p2")
# The rule takes a design for its sample quality where none is admissible; the fastest one is judged beside it.
FASTEST = "measured:root-long"
MAIN = ("vanilla", "vanilla-again", "curriculum", "anti", "static", *SIMPLE, "measured", FASTEST)
CONSTANT = ("vanilla", "curriculum", "anti", "p2")
FEWER = ("vanilla", "vanilla-again", "curriculum", "static", "log-snr", "p2", "measured", FASTEST)
MLP = "mlp:width=96,depth=2"  # half the cost of the default, and still wider than the digits have dimensions
METRICS = ("fd-pixels", "sw-pixels")
QUALITY = 0.02
CURRICULUM_SHARE = 0.25
FIGURES = ("forest", "learning_curves", "task_curves", "exposure")
STAGES = ("measure", "explore", "confirm", "constant", "noise")


@dataclass(frozen=True)
class Setting:
    """What is trained, and how it is confirmed."""

    data: str
    process: str
    prediction: str
    network: str = MLP
    steps: int = 1500
    arms: tuple[str, ...] = MAIN
    exploring: bool = False
    constant: bool = False


# The most important first.
SETTINGS = {
    "digits-mixture-cosine-v": Setting("digits-mixture", "vp-cosine", "v", exploring=True, constant=True),
    "digits-mixture-linear-eps": Setting("digits-mixture", "vp-linear", "eps", exploring=True, constant=True),
    "digits-linear-eps": Setting("digits", "vp-linear", "eps", steps=800, arms=FEWER),
    "grid-2d-linear-eps": Setting("grid-2d", "vp-linear", "eps", "mlp:width=64", 3000, FEWER, True),
    "photo-patches-flow": Setting("photo-patches-8", "flow-matching", "velocity", steps=800, arms=FEWER),
    "grid-2d-edm": Setting("grid-2d", "edm", "edm", "mlp:width=64", arms=FEWER),
}


@dataclass(frozen=True)
class Budget:
    """How long the studies work."""

    share: float = 1.0  # of the iterations of a setting
    explore_seeds: tuple[int, ...] = (0, 1, 2, 3)
    confirm_seeds: tuple[int, ...] = (100, 101, 102, 103, 104, 105, 106, 107)
    expert_seeds: tuple[int, ...] = (0, 1)
    expert_budget: int = 400
    tasks: int = 20
    samples: int = 1024


SMOKE = Budget(0.005, (0, 1), (100, 101), (0,), 20, 5, 64)


def run_measure(setting: Setting, budget: Budget, folder: Path) -> None:
    plan = ExpertPlan(
        network=setting.network,
        prediction=setting.prediction,
        seeds=budget.expert_seeds,
        budget=budget.expert_budget,
    )
    measure(
        setting.data, setting.process, out=folder / "measurement", tasks=budget.tasks, grid="log-snr",
        measures=("convergence",), plan=plan,
    )  # fmt: skip


def run_compare(
    setting: Setting, budget: Budget, folder: Path, stage: str, arms: Sequence[str], schedule: str = "cosine"
) -> None:
    process, ranking = get_process(setting.process), Ranking.load(folder / "measurement")
    curriculum = make_curriculum(
        ranking,
        method="kmeans" if stage != "noise" else "contiguous",
        measure="excess_nats" if stage != "noise" else "noise-level",
        k=min(5, budget.tasks),
        pacing="fraction",
        pacing_options={"share": CURRICULUM_SHARE},
        process=process,
    )
    explores = stage == "explore"
    began = time.monotonic()
    compare(
        load_dataset(setting.data),
        process,
        arms,
        ranking=ranking,
        curriculum=curriculum,
        seeds=budget.explore_seeds if explores else budget.confirm_seeds,
        steps=round(budget.share * setting.steps),
        out=folder / stage,
        network=setting.network,
        prediction=setting.prediction,
        lr_schedules=[schedule],
        metrics=METRICS,
        samples=budget.samples,
        confirms=folder / "explore" if not explores and setting.exploring else None,
        progress=lambda what, done, total: print(f"  {done}/{total} {time.monotonic() - began:.0f} s", flush=True),
    )


def geometric_mean(x: pd.Series) -> float:
    return float(np.exp(np.log(x).mean()))


def choose(folders: dict[str, Path]) -> pd.DataFrame:
    """Every design in every setting that explored, the pooled figures by the rule, and which design they choose."""
    rows = []
    for name, folder in folders.items():
        effects = pd.read_csv(folder / "explore" / "effects.csv").set_index(["arm", "metric"])["log_ratio"]
        speed = pd.read_csv(folder / "explore" / "speed.csv").groupby("arm")
        for arm in ("log-snr", *(f"measured:{design}" for design in DESIGNS)):
            own = {metric: effects[arm, metric] for metric in ("nats", "loss", *METRICS)}
            runs = speed.get_group(arm)
            facts = {"share": geometric_mean(runs["share"]), "every_seed_reached": not runs["censored"].any()}
            rows.append({"setting": name, "arm": arm} | facts | own)
    table = pd.DataFrame(rows)
    pooled = table.groupby("arm", sort=False).agg(
        share=("share", geometric_mean),
        every_seed_reached=("every_seed_reached", "all"),
        **{metric: (metric, "mean") for metric in ("nats", "loss", *METRICS)},
    )
    pooled["quality"] = pooled[list(METRICS)].mean(axis=1)
    designs = pooled[pooled.index.str.startswith("measured:")]
    admissible = designs[designs["quality"] <= QUALITY]
    best = admissible["share"].idxmin() if len(admissible) else designs["quality"].idxmin()
    pooled["admissible"] = pooled["quality"] <= QUALITY
    pooled["chosen"] = pooled.index == best
    return pd.concat([table, pooled.reset_index().assign(setting="(all)")])


def publish(folder: Path, out: Path) -> None:
    """Copy the tables, the report and a few figures of the finished stages; runs and weights stay where they are."""
    for stage in STAGES[1:]:
        source, target = folder / stage, out / folder.name / stage
        if not (source / "effects.csv").exists():
            continue
        (target / "figures").mkdir(parents=True, exist_ok=True)
        for name in ("run.json", "effects.csv", "comparison.csv", "order.csv", "speed.csv", "exposure.csv"):
            shutil.copy(source / name, target / name)
        if stage != "explore":
            draw_folder(source)
            for name in FIGURES:
                shutil.copy(source / "figures" / f"{name}.png", target / "figures")
        write_report(target)
        (target / "report.html").unlink()
    shutil.copy(folder / "measurement" / "ranking.json", out / folder.name / "ranking.json")


def summarise(out: Path) -> None:
    """verdicts.csv and the figure over all settings, from the committed comparisons alone."""
    confirmed = {name: out / name / "confirm" for name in SETTINGS if (out / name / "confirm" / "effects.csv").exists()}
    constant = {
        name if stage == "constant" else f"{name}, noisiest first": out / name / stage
        for stage in ("constant", "noise")
        for name in SETTINGS
        if (out / name / stage / "run.json").exists()
    }
    tables = [verdict_table(folders) for folders in (confirmed, constant) if folders]
    write_table(out / "verdicts.csv", pd.concat(tables))
    figure = overview(confirmed, ("nats", *METRICS))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_bytes(out / "overview.png", buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--out", type=Path, default=Path("results/comparison"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    budget = SMOKE if options.smoke else Budget()
    for stage in options.stages:
        for name in options.settings:
            setting, folder = SETTINGS[name], options.runs / name
            began = time.monotonic()
            if stage == "measure":
                run_measure(setting, budget, folder)
            elif stage == "explore" and setting.exploring:
                arms = ["vanilla", "log-snr", *(f"measured:{design}" for design in DESIGNS)]
                run_compare(setting, budget, folder, stage, arms)
            elif stage == "confirm":
                run_compare(setting, budget, folder, stage, setting.arms)
            elif stage == "constant" and setting.constant:
                run_compare(setting, budget, folder, stage, CONSTANT, "constant")
            elif stage == "noise" and setting.constant:
                run_compare(setting, budget, folder, stage, ("vanilla", "curriculum"), "constant")
            print(f"{stage} {name}: {time.monotonic() - began:.0f} s", flush=True)
        explored = {name: options.runs / name for name in options.settings if SETTINGS[name].exploring}
        if stage == "explore" and explored:
            write_table(options.out / "designs.csv", choose(explored))
    for name in options.settings:
        publish(options.runs / name, options.out)
    summarise(options.out)


if __name__ == "__main__":
    main()
