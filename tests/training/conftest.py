"""Small worlds for the tests of training: a short process, an exact Gaussian, and a ranking written by hand."""

from collections.abc import Iterator

import numpy as np
import pytest

from difficulty.datasets import Dataset, load_dataset
from difficulty.process import Process, get_process
from difficulty.ranking import MeasureRanking, Ranking, RankingTask
from difficulty.tasks import make_tasks
from training.curriculum import Curriculum
from training.curriculum_builders import make_curriculum

# Difficulty of eight tasks, cleanest first: three groups that are plain to see, neither monotone nor contiguous.
VALUES = [9.0, 10.0, 1.0, 1.1, 10.5, 0.1, 0.11, 0.12]


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is computed once is computed once per session, not found from one before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENOISING_DIFFICULTY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def process() -> Process:
    return get_process("vp-linear:T=80")


@pytest.fixture(scope="session")
def gaussian() -> Dataset:
    return load_dataset("gaussian:dim=4,var=0.25,n=400")


@pytest.fixture(scope="session")
def ranking(process: Process, gaussian: Dataset) -> Ranking:
    order = [int(i) for i in np.argsort(VALUES, kind="stable")]
    rank = [order.index(i) + 1 for i in range(len(VALUES))]
    measure = MeasureRanking(
        unit="nats",
        value=list(VALUES),
        ci_low=list(VALUES),
        ci_high=list(VALUES),
        rank=list(rank),
        rank_low=list(rank),
        rank_high=list(rank),
        flagged=[False] * len(VALUES),
        order=order,
    )
    return Ranking(
        process=process.fingerprint,
        dataset=gaussian.fingerprint,
        grid="t",
        interval_level=0.9,
        tasks=[RankingTask.of(task, process) for task in make_tasks(process, len(VALUES))],
        measures={"excess_nats": measure},
        kendall_tau=[],
        verdict=[],
        provenance={},
    )


@pytest.fixture(scope="session")
def curriculum(ranking: Ranking) -> Curriculum:
    return make_curriculum(ranking, method="kmeans", k=3)


@pytest.fixture(scope="session")
def one_cluster(ranking: Ranking) -> Curriculum:
    return make_curriculum(ranking, method="uniform", k=1)
