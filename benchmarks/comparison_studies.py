"""Does an order or a density of timesteps help? The studies behind results/comparison, from data to verdict.

Every setting (data, process, prediction) goes through these stages or some of them; each continues where it stopped:

    measure    experts on 20 tasks of equal width in log-SNR: the difficulty from which curriculum and recipe are made
    explore    all designs of the recipe `measured` on exploration seeds, learning rate annealed
    confirm    the main arms on confirmation seeds, learning rate annealed
    constant   some of them with a constant learning rate
    noise      the noisiest tasks first, whatever was measured, likewise with a constant learning rate
    controls   what the curriculum's order is made of, learning rate annealed
    later      the design `ordered`, made after the first confirmation, on the exploration seeds
    fresh      the same beside its parts on seeds that nothing before has used
    rivals     the same seeds, with the simple arm that was best on held-out nats as the baseline
    long       the noisiest tasks first once more, four times as long, as the earlier finding had it
    judge      all settings, all simple arms and the recipe with their controls, on seeds of which nothing was chosen:
               what is claimed is claimed from these

Between exploring and confirming one design is chosen over all settings by a rule that was written down before any of
them was trained (``choose``): a design is admissible if its change of sample quality, the mean over settings and both
sample metrics of the mean log-ratio to plain training, is at most 2 %; of these the one that reaches plain training's
final held-out nats after the smallest share of its iterations, geometric mean over settings, a run that does not reach
it counting as 1; if none is admissible, the one with the least change of sample quality.

None was admissible, and the design which the rule took instead, `guarded`, is slow. So `measured` was chosen a second
time (``choose_again``), by what the fresh seeds say: of the designs that hurt held-out nats in no setting, the one that
reaches plain training's final nats after the smallest share of its iterations, pooled as before. Settings whose
``judging`` is true were trained after that and took part in no choice.

    python benchmarks/comparison_studies.py                      everything, an hour and a half on one core
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
from difficulty.expert_plan import ExpertPlan
from difficulty.measurement import measure
from difficulty.plots import save_figure
from difficulty.process import get_process
from difficulty.ranking import Ranking
from difficulty.records import read_run, write_bytes, write_table
from training.compare import compare
from training.curriculum_builders import make_curriculum
from training.effects import effects, holm
from training.plots_comparison import COMPARISON_FIGURES, overview
from training.recipe import DESIGNS, ORDERED
from training.report import write_report
from training.verdicts import verdict_table

SIMPLE = ("log-snr", "min-snr", "p2")
# The first rule takes a design for its sample quality where none is admissible; the fastest one is judged beside it.
FIRST, FASTEST = "measured:guarded", "measured:root-long"
MAIN = ("vanilla", "vanilla-again", "curriculum", "anti", "static", *SIMPLE, FIRST, FASTEST)
CONSTANT = ("vanilla", "curriculum", "anti", "p2")
CONTROLS = (
    *("vanilla", "random", "non-accumulating", "first-then-all", "paper"),
    *("curriculum+min-snr", "curriculum+p2", "logit-normal"),
)
FEWER = ("vanilla", "vanilla-again", "curriculum", "static", "log-snr", "p2", FIRST, FASTEST)
JUDGING = ("vanilla", "vanilla-again", "curriculum", "static", *SIMPLE, "log-normal", "measured", "measured:ordered")
DENSITIES = ("logit-normal", "log-normal")
RECIPES = ("measured", "measured:ordered")
JUDGED = (
    *("vanilla", "vanilla-again", "curriculum", "static", "anti", *SIMPLE, *DENSITIES),
    *("measured", "measured-static", "measured:ordered"),
)
MLP = "mlp:width=96,depth=2"  # half the cost of the default, and still wider than the digits have dimensions
METRICS = ("fd-pixels", "sw-pixels")
QUALITY = 0.02
CURRICULUM_SHARE = 0.25
FIGURES = ("forest", "learning_curves", "task_curves", "exposure")
STAGES = ("measure", "explore", "confirm", "constant", "noise", "controls", "later", "fresh", "rivals", "long", "judge")
EXPLORED = tuple(f"measured:{name}" for name in DESIGNS if name not in ORDERED)
LATER = tuple(f"measured:{name}" for name in ORDERED)
CONFIRMS = {"confirm": "explore", "constant": "explore", "noise": "explore", "controls": "explore", "fresh": "later"}
SEEDS_OF = {
    **dict.fromkeys(("explore", "later"), "explore_seeds"),
    **dict.fromkeys(("fresh", "rivals"), "fresh_seeds"),
    "judge": "judge_seeds",
}
LONGER = 4


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
    controls: bool = False
    fresh: bool = False
    judging: bool = False


# The most important first.
SETTINGS = {
    "digits-mixture-cosine-v": Setting(
        "digits-mixture", "vp-cosine", "v", exploring=True, constant=True, controls=True, fresh=True
    ),
    "digits-mixture-linear-eps": Setting(
        "digits-mixture", "vp-linear", "eps", exploring=True, constant=True, controls=True, fresh=True
    ),
    "digits-linear-eps": Setting("digits", "vp-linear", "eps", steps=800, arms=FEWER, constant=True, fresh=True),
    "digits-linear-eps-long": Setting("digits", "vp-linear", "eps", arms=(), fresh=True),
    "grid-2d-linear-eps": Setting("grid-2d", "vp-linear", "eps", "mlp:width=64", 3000, FEWER, True, fresh=True),
    "photo-patches-flow": Setting(
        "photo-patches-8", "flow-matching", "velocity", steps=800, arms=FEWER, constant=True, fresh=True
    ),
    "digits-mixture-edm": Setting("digits-mixture", "edm", "edm", arms=JUDGING, judging=True),
    "digits-cosine-v": Setting("digits", "vp-cosine", "v", arms=JUDGING, judging=True),
}


@dataclass(frozen=True)
class Budget:
    """How long the studies work."""

    share: float = 1.0  # of the iterations of a setting
    explore_seeds: tuple[int, ...] = (0, 1, 2, 3)
    confirm_seeds: tuple[int, ...] = tuple(range(100, 108))
    fresh_seeds: tuple[int, ...] = tuple(range(200, 208))
    judge_seeds: tuple[int, ...] = tuple(range(300, 308))
    expert_seeds: tuple[int, ...] = (0, 1)
    expert_budget: int = 400
    tasks: int = 20
    samples: int = 1024


SMOKE = Budget(0.005, (0, 1), (100, 101), (200, 201), (300, 301), (0,), 20, 5, 64)


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
    by_noise = stage in ("noise", "long")
    curriculum = make_curriculum(
        ranking,
        method="contiguous" if by_noise else "kmeans",
        measure="noise-level" if by_noise else "excess_nats",
        k=min(5, budget.tasks),
        pacing="fraction",
        pacing_options={"share": CURRICULUM_SHARE},
        process=process,
    )
    began = time.monotonic()
    compare(
        load_dataset(setting.data),
        process,
        arms,
        ranking=ranking,
        curriculum=curriculum,
        seeds=getattr(budget, SEEDS_OF.get(stage, "confirm_seeds")),
        steps=round(budget.share * setting.steps * (LONGER if stage == "long" else 1)),
        out=folder / stage,
        network=setting.network,
        prediction=setting.prediction,
        lr_schedules=[schedule],
        metrics=METRICS,
        samples=budget.samples,
        confirms=explored(setting, folder, stage),
        progress=lambda what, done, total: print(f"  {done}/{total} {time.monotonic() - began:.0f} s", flush=True),
    )


def explored(setting: Setting, folder: Path, stage: str) -> Path | None:
    """The comparison that a stage confirms: for the last one whatever was looked at before on other seeds."""
    if stage == "judge":
        return folder / ("confirm" if setting.arms else "fresh")
    return folder / CONFIRMS[stage] if stage in CONFIRMS and setting.exploring else None


def geometric_mean(x: pd.Series) -> float:
    return float(np.exp(np.log(x).mean()))


def choose(folders: dict[str, Path]) -> pd.DataFrame:
    """Every design in every setting that explored, the pooled figures by the rule, and which design they choose."""
    rows = []
    for name, folder in folders.items():
        change = pd.read_csv(folder / "explore" / "effects.csv").set_index(["arm", "metric"])["log_ratio"]
        speed = pd.read_csv(folder / "explore" / "speed.csv").groupby("arm")
        for arm in ("log-snr", *EXPLORED):
            own = {metric: change[arm, metric] for metric in ("nats", "loss", *METRICS)}
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


def choose_again(out: Path) -> pd.DataFrame:
    """The designs that were judged on fresh seeds, by setting and pooled, and which of them the second rule chooses."""
    folders = {
        name: out / name / "fresh"
        for name, setting in SETTINGS.items()
        if not setting.judging and (out / name / "fresh" / "effects.csv").exists()
    }
    rows = []
    for name, folder in folders.items():
        nats = pd.read_csv(folder / "effects.csv").query("metric == 'nats'").set_index("arm")
        shares = pd.read_csv(folder / "speed.csv").groupby("arm")["share"].agg(geometric_mean)
        for arm in (FASTEST, *LATER):
            change = nats.loc[arm, ["log_ratio", "ci_low", "ci_high"]].to_dict()
            rows.append({"setting": name, "arm": arm, "share": shares[arm]} | change)
    table = pd.DataFrame(rows)
    table["hurts"] = table["ci_low"] > 0
    pooled = table.groupby("arm", sort=False).agg(share=("share", geometric_mean), hurts=("hurts", "any"))
    harmless = pooled.loc[~pooled["hurts"], "share"]
    pooled["chosen"] = pooled.index == (harmless.idxmin() if len(harmless) else FIRST)
    return pd.concat([table, pooled.reset_index().assign(setting="(all)")])


def publish(folder: Path, out: Path) -> None:
    """Copy tables and report of the finished stages, and draw the figures of the judging one; runs and weights stay."""
    for stage in STAGES[1:]:
        source, target = folder / stage, out / folder.name / stage
        if not (source / "effects.csv").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        for name in ("run.json", "effects.csv", "comparison.csv", "order.csv", "speed.csv"):
            shutil.copy(source / name, target / name)
        if stage == "judge":
            for name in ("exposure.csv", "task_curves.csv", "task_bounds.csv"):
                shutil.copy(source / name, target / name)
            curves = pd.read_csv(source / "curves.csv")
            write_table(target / "curves.csv", curves[curves["metric"].isin(["nats", "loss"])], digits=7)
            for name in FIGURES:
                figure = COMPARISON_FIGURES[name](target)
                assert figure is not None
                save_figure(figure, target / "figures", name)
                (target / "figures" / f"{name}.svg").unlink()
        write_report(target)
        (target / "report.html").unlink()
    shutil.copy(folder / "measurement" / "ranking.json", out / folder.name / "ranking.json")


def finished(out: Path, stage: str) -> dict[str, Path]:
    """Folders of the settings whose comparison of that stage is there."""
    folders = {name: out / name / stage for name in SETTINGS}
    return {name: folder for name, folder in folders.items() if (folder / "effects.csv").exists()}


def against_the_best(folders: dict[str, Path]) -> pd.DataFrame:
    """The recipe, paired with the simple arm that is best on the same seeds, by setting and metric; p after Holm."""
    tables = []
    for setting, folder in folders.items():
        final = pd.read_csv(folder / "comparison.csv")
        for metric in ("nats", *METRICS):
            own = final[final["metric"] == metric]
            level = np.log(own["value"]).groupby(own["arm"]).mean()
            best = str(level[[*SIMPLE, *DENSITIES]].idxmin())
            table = effects(own[own["arm"].isin([best, *RECIPES])], best)
            tables.append(table.assign(setting=setting, rival=best))
    table = pd.concat(tables, ignore_index=True)
    table["p_holm"] = holm(table["p"].tolist())
    return table[["setting", "metric", "rival", "arm", "seeds", "log_ratio", "ci_low", "ci_high", "p", "p_holm"]]


def summarise(out: Path) -> None:
    """verdicts.csv, rivals.csv and the figure over all settings, from the committed comparisons alone."""
    tables = []
    for stage in STAGES[1:]:
        folders = finished(out, stage)
        if folders:
            confirms = {name: read_run(folder, "compare")["config"]["confirms"] for name, folder in folders.items()}
            table = verdict_table(folders)
            tables.append(table.assign(stage=stage, confirmed=table["setting"].map(confirms).notna()))
    table = pd.concat(tables, ignore_index=True)
    first = ["setting", "stage", "confirmed"]
    write_table(out / "verdicts.csv", table[[*first, *table.columns.drop(first)]])
    judged = finished(out, "judge")
    if judged:
        write_table(out / "rivals.csv", against_the_best(judged))
        buffer = io.BytesIO()
        overview(judged, ("nats", *METRICS)).savefig(buffer, format="png", dpi=130)
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
                run_compare(setting, budget, folder, stage, ["vanilla", "log-snr", *EXPLORED])
            elif stage == "controls" and setting.controls:
                run_compare(setting, budget, folder, stage, CONTROLS)
            elif stage == "later" and setting.exploring:
                run_compare(setting, budget, folder, stage, ["vanilla", *LATER])
            elif stage == "fresh" and setting.fresh:
                run_compare(setting, budget, folder, stage, ["vanilla", "curriculum", FASTEST, *LATER])
            elif stage == "rivals" and setting.fresh and setting.process == "vp-linear" and setting.arms:
                run_compare(setting, budget, folder, stage, ["log-snr", "min-snr", "p2", FASTEST, *LATER])
            elif stage == "judge":
                run_compare(setting, budget, folder, stage, JUDGED)
            elif stage == "confirm" and setting.arms:
                run_compare(setting, budget, folder, stage, setting.arms)
            elif stage == "constant" and setting.constant:
                run_compare(setting, budget, folder, stage, CONSTANT, "constant")
            elif stage in ("noise", "long") and setting.controls:
                run_compare(setting, budget, folder, stage, ("vanilla", "curriculum"), "constant")
            print(f"{stage} {name}: {time.monotonic() - began:.0f} s", flush=True)
        exploring = {name: options.runs / name for name in options.settings if SETTINGS[name].exploring}
        if stage == "explore" and exploring:
            write_table(options.out / "designs.csv", choose(exploring))
    for name in options.settings:
        publish(options.runs / name, options.out)
    if any(options.out.glob("*/fresh/effects.csv")):
        write_table(options.out / "second_choice.csv", choose_again(options.out))
    summarise(options.out)


if __name__ == "__main__":
    main()
