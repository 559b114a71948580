"""The commands that read what was measured: ``difficulty rank``, ``agree``, ``recommend`` and ``plot``."""

__all__ = ["agree", "plot", "rank", "recommend"]

from pathlib import Path
from typing import Annotated

import tyro

from difficulty.commands.arguments import FolderArgument, json_text, print_ranking, tell


def agree(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    measures: tuple[str, ...] = ("excess_nats",),
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Do results folders agree on which tasks are hard? Predictions, processes, seeds, experts and shared networks.

    Example: difficulty agree runs/eps runs/x0 runs/v-probe --measures excess_nats log_regret

    Folders are compared two by two, over their tasks if these are the same, else over the log-SNR that both cover; the
    seeds of each measurement are compared too. Without an exact law those of equal process and tasks are given the best
    floor that any one knows.

    Args:
        folders: of `difficulty measure` or `difficulty probe`, all of the same data.
        measures: by which the tasks are ordered, of convergence or relative entropy, as named in ranking.json.
        out: CSV file to write.
        json: print the table as JSON on standard output.
    """
    from difficulty.agreement import agreement_sentences, agreement_table
    from difficulty.records import write_table

    table = agreement_table(folders, measures)
    if out is not None:
        write_table(out, table)
    print(table.to_json(orient="records") if json else "\n".join(agreement_sentences(table)))


def plot(folder: FolderArgument, /) -> None:
    """Draw the figures of a finished measurement again from its tables.

    Example: difficulty plot runs/digits

    Args:
        folder: of a finished measurement.
    """
    from difficulty.plots import plot_folder

    for path in plot_folder(folder):
        print(path)


def rank(folder: FolderArgument, /, floor_from: tuple[Path, ...] = (), json: bool = False) -> None:
    """Make ranking.json of a finished measurement again from its tables.

    Example: difficulty rank runs/digits --json

    Args:
        folder: of a finished measurement.
        floor_from: folders of `difficulty measure` or `difficulty probe` on the same data, process and tasks; the best
            loss that any of them knows becomes the floor, and the tables are written anew.
        json: print ranking.json on standard output.
    """
    from difficulty.agreement import rank_over_joint_floor
    from difficulty.measurement_folder import rank_folder

    found = rank_over_joint_floor(folder, floor_from) if floor_from else rank_folder(folder)
    print_ranking(found.model_dump(), json)


def recommend(
    folder: FolderArgument, /, experts: int = 4, measure: str = "excess_nats", json: bool = False
) -> None:
    """From a ranking: boundaries of experts with equal burden, and densities of noise levels as trainers' flags.

    Example: difficulty recommend runs/digits --experts 4

    `difficulty profile` prints the same from a profile.

    Args:
        folder: with ranking.json, of `difficulty measure` or `difficulty probe`.
        experts: number of experts.
        measure: of the ranking; must be a density per unit log-SNR.
        json: print everything as JSON.
    """
    from difficulty.process_file import read_process
    from difficulty.ranking import Ranking
    from difficulty.recommend import advise, burden_of_ranking, wide_tasks

    ranking = Ranking.load(folder)
    process = read_process(folder, ranking.process)
    burden = burden_of_ranking(ranking, measure)
    advice = advise(f"{measure} of the ranking", *burden, {process.name: process}, experts)
    for sentence in [*ranking.doubts(measure), *wide_tasks(ranking)]:
        tell(sentence)
    print(json_text(advice) if json else "\n".join(advice["sentences"]))
