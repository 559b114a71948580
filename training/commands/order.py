"""The commands that make and check a curriculum: ``training cluster``, ``recipe``, ``static`` and ``validate``."""

__all__ = ["cluster", "recipe", "static", "validate"]

import json as jsonlib
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from difficulty.errors import InputError
from difficulty.process import get_process
from difficulty.ranking import Ranking
from difficulty.records import read_run, read_table
from training.commands.arguments import File, ranked_process, warn
from training.curriculum import Curriculum, known_process
from training.curriculum_builders import exposure_matched, make_curriculum
from training.curriculum_builders import first_then_all as with_first_apart
from training.recipe import CHOSEN, MEASURE, measured_recipe


def cluster(
    folder: File,
    method: str = "kmeans",
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("curriculum.json"),
    measure: str | None = None,
    order: str = "easy-to-hard",
    seed: int = 0,
    accumulate: bool = True,
    first_then_all: bool = False,
    pacing: str = "fraction",
    pacing_options: tuple[str, ...] = (),
    density: str = "uniform",
    process: str | None = None,
    json: bool = False,
) -> None:
    """Group the tasks of a ranking into clusters and write a curriculum.

    Example: training cluster results/quickstart-digits/measurement --method kmeans -k 5 -o curriculum.json

    Args:
        folder: Results folder with ranking.json, or that file.
        method: kmeans, quantile, mass, uniform or contiguous group the tasks; snr and log-snr cut the timesteps anew by
            noise level, as in the paper.
        k: Number of clusters.
        output: File to write.
        measure: Measure of the ranking that decides; noise-level for noisier is easier. Default:
            noise-level for snr and log-snr, else excess_nats if there.
        order: easy-to-hard, hard-to-easy or random.
        seed: Of the random order.
        accumulate: Whether clusters stay in training once they joined.
        first_then_all: Only the first cluster is trained apart, then everything.
        pacing: Rule that ends a stage: fraction, patience, patience-smoothed, patience-kept or held-out.
        pacing_options: Options of the rule as name=value, such as share=0.2 or tau=200.
        density: Base density of t: uniform, log-snr, log-normal:mean=-1.2,std=1.2, logit-normal, cosine-map, or
            measured:power=1,uniform_share=0.5, partly proportional to the measure.
        process: Process of the ranking, by name or your own; default: that of the results folder.
        json: Print the curriculum as JSON.
    """
    if first_then_all and not accumulate:
        raise InputError("--first-then-all goes on with everything, the first cluster too; leave out --no-accumulate")
    ranking = Ranking.load(folder)
    curriculum = make_curriculum(
        ranking,
        method=method,
        k=k,
        measure=measure,
        order=order,
        seed=seed,
        accumulate=accumulate,
        pacing=pacing,
        pacing_options=_options(pacing_options),
        base_density=density,
        process=ranked_process(process, ranking, folder),
    )
    if first_then_all:
        curriculum = with_first_apart(curriculum)
    curriculum.save(output)
    _warn_of_doubts(ranking, curriculum.provenance["measure"])
    if json:
        print(jsonlib.dumps(curriculum.model_dump()))
        return
    found = f"{len(curriculum.clusters)} clusters"
    if first_then_all:
        found += f", the first of {k} and all others together,"
    print(f"{output}: {found} by {method} of {curriculum.provenance['measure']}, {order}")
    _describe(curriculum)


def recipe(
    folder: File, design: str = CHOSEN, output: Path = Path("measured.json"), process: str | None = None
) -> None:
    """Write the recipe `measured` for a ranking as a curriculum: a density of t that changes over the run.

    Example: training recipe results/quickstart-digits/measurement --design ordered --output measured.json

    Args:
        folder: Results folder with ranking.json, or that file; tasks of equal width in log-SNR serve best.
        design: root-long, ordered, half, root, mild, annealed, guarded or log-snr; see training/recipe.py.
        output: File to write.
        process: Process of the ranking, by name or your own; default: that of the results folder.
    """
    ranking = Ranking.load(folder)
    curriculum = measured_recipe(ranking, ranked_process(process, ranking, folder), design)
    curriculum.save(output)
    _warn_of_doubts(ranking, MEASURE)
    print(f"{output}: recipe {design} from {MEASURE}, {len(curriculum.density_phases) + 1} densities of t")


def _warn_of_doubts(ranking: Ranking, measure: str) -> None:
    for sentence in ranking.doubts(measure) if measure in ranking.measures else []:
        warn(sentence)


def static(run: File, output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("static.json")) -> None:
    """Write the control of a run's curriculum: t as often as that run drew it, but without any order.

    Example: training static runs/digits -o static.json

    Args:
        run: Folder of a finished `training run` with a curriculum.
        output: File to write.
    """
    if read_run(run, "train")["config"].get("curriculum") is None:
        raise InputError(f"{run} was trained without a curriculum: it has no order to be freed of")
    curriculum = Curriculum.load(run / "curriculum.json")
    table = read_table(run / "coverage.csv", ("t", "expected"))
    if list(table["t"]) != list(range(1, curriculum.tasks[-1].t_last + 1)):
        raise InputError(f"{run / 'coverage.csv'} does not hold every t of the curriculum beside it")
    exposure = np.append(0.0, table["expected"].to_numpy(float))
    exposure_matched(curriculum, exposure).save(output)
    print(f"{output}: the histogram of t of {run}, without its order")


def validate(curriculum: File, process: str | None = None, json: bool = False) -> int:
    """Check a curriculum.json; exit code 2 and one sentence if it is not valid.

    Example: training validate curriculum.json --process vp-linear

    Args:
        curriculum: The file.
        process: Process that it must have been made for, by name; default: the one that it names, if built in.
        json: Print the verdict as JSON.
    """
    try:
        loaded = Curriculum.load(curriculum)
        chosen = get_process(process) if process else known_process(loaded.process, str(curriculum))
        loaded.validate_for(chosen, str(curriculum))
    except InputError as error:
        if json:
            print(jsonlib.dumps({"valid": False, "reason": str(error)}))
        raise
    if json:
        print(jsonlib.dumps({"valid": True, "sha256": loaded.sha256, "stages": loaded.stages()}))
        return 0
    print(f"{curriculum} is valid for process {chosen.name!r} with T = {chosen.T}")
    _describe(loaded)
    return 0


def _options(items: tuple[str, ...]) -> dict[str, float | int | bool]:
    options: dict[str, float | int | bool] = {}
    for item in items:
        name, equals, text = item.partition("=")
        try:
            options[name] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            raise InputError(f"pacing option {item!r} is not of the form name=number") from None
        if not equals:
            raise InputError(f"pacing option {item!r} is not of the form name=number")
    return options


def _describe(curriculum: Curriculum) -> None:
    for number, held in enumerate(curriculum.clusters, 1):
        tasks = [curriculum.tasks[index] for index in sorted(held.tasks)]
        timesteps = ", ".join(f"{task.t_first}..{task.t_last}" for task in tasks)
        difficulty = "" if held.difficulty is None else f" difficulty {held.difficulty:.4g};"
        print(f"  cluster {number}:{difficulty} t = {timesteps}")
