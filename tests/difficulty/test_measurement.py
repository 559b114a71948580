"""A measurement whose experts fail says so, in words and in figures."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from difficulty import measurement
from difficulty.convergence import convergence_table
from difficulty.errors import InputError
from difficulty.expert_crew import Crew
from difficulty.expert_plan import ExpertPlan
from difficulty.measurement import measure
from difficulty.measurement_folder import convergence_estimates
from difficulty.plots import difficulty_figure, plot_folder, rank_figure
from difficulty.process import get_process
from difficulty.ranking import rank_tasks
from difficulty.tasks import make_tasks

PLAN = ExpertPlan(seeds=(0, 1), budget=20, batch=8, heldout_draws=20)
OWN = """
import torch

class Late(torch.nn.Linear):
    def __init__(self, shape):
        super().__init__(shape[0], shape[0])

    def forward(self, x, log_snr):
        return torch.where(log_snr[:, None] < -3, float("nan"), super().forward(x))

class Never(Late):
    def forward(self, x, log_snr):
        return 0 * super().forward(x, log_snr.abs())
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A function that measures with a network of ``OWN``, or with a learning rate; it gives the folder and ranking."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "own.py").write_text(OWN)

    def run(network="", **changes):
        plan = replace(PLAN, **changes) if changes else replace(PLAN, network=f"{folder / 'own.py'}:{network}")
        out = folder / (network or "diverged")
        return out, measure("grid-2d:n=200", out=out, tasks=4, measures=["convergence"], plan=plan).ranking

    return run


def test_tasks_whose_experts_diverged_are_named_and_decide_nothing(measured):
    folder, ranking = measured("Late")
    assert "Experts of t 501..750, 751..1000 diverged." in ranking.verdict
    excess = ranking.measures["excess_nats"]
    assert excess.value[2:] == [None, None]
    assert (excess.rank_low[2:], excess.rank_high[2:]) == ([3, 3], [4, 4])
    assert "is not decided" in ranking.verdict[0]
    # On the upper edge of the panel, and hollow.
    edge = [line for line in difficulty_figure(folder).axes[0].lines if list(line.get_ydata()) == [1, 1]]
    assert [line.get_markerfacecolor() for line in edge] == ["white"]
    ranks = [line for line in rank_figure(folder).axes[0].lines if 3 in line.get_ydata() or 4 in line.get_ydata()]
    assert {line.get_markerfacecolor() for line in ranks if line.get_marker() in "os^"} == {"white"}
    plt.close("all")


def test_tasks_whose_experts_never_learned_are_named_and_flagged(measured):
    _, ranking = measured("Never")
    assert "Experts of t 1..250, 251..500, 501..750, 751..1000 are no better" in " ".join(ranking.verdict)
    assert all(ranking.measures["excess_nats"].flagged)
    assert ranking.measures["excess_nats"].rank_high == [4] * 4
    named = [sentence for sentence in ranking.verdict if ", easiest t" in sentence]
    assert named == []


def test_a_measurement_of_which_every_expert_diverged_is_drawn(measured):
    folder, ranking = measured(learning_rate=1e30)
    assert ranking.measures["excess_nats"].value == [None] * 4
    assert {path.stem for path in plot_folder(folder)} == {"difficulty", "ranks", "agreement", "learning_curves"}


def test_experts_of_several_rounds_are_not_trained_again_after_an_interruption_of_what_follows(tmp_path, monkeypatch):
    plan = replace(PLAN, network="mlp:width=8", start="neighbour")  # a round for every task

    def go(out):
        return measure("gaussian:dim=2,var=0.25,n=100", out=out, tasks=3, plan=plan)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(measurement, "kl", interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("experts.partial.*-of-3.safetensors"))) == 3
    whole = go(tmp_path / "whole")
    monkeypatch.setattr(Crew, "step", interrupt)
    pd.testing.assert_frame_equal(go(tmp_path / "parts").losses, whole.losses)
    assert not list(tmp_path.glob("*/experts.partial*"))


def test_what_is_not_known_of_the_floor_and_of_other_seeds_is_said(tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((200, 2)) * [1, 0.2])
    plan = replace(PLAN, network="mlp:width=8", seeds=(0,))
    data, out = tmp_path / "rows.npy", tmp_path / "out"
    ranking = measure(data, out=out, tasks=4, measures=["convergence"], plan=plan).ranking
    said = " ".join(ranking.verdict)
    assert "excess_nats, log_regret, paper_style_floor, power_law are taken over the best loss known" in said
    assert "Only one seed was trained" in said
    assert "survive" not in said
    assert "holds" not in said
    excess = ranking.measures["excess_nats"]
    assert excess.note == "over the best loss known, so a lower bound"
    assert ranking.measures["paper_style"].note == ""
    assert excess.ci_low == excess.ci_high == [None] * 4
    assert {path.stem for path in plot_folder(out)} == {"difficulty", "ranks", "agreement", "learning_curves"}
    plt.close("all")


def test_an_interrupted_measurement_does_not_go_on_with_an_edited_network(tmp_path):
    class Stopped(Exception):
        pass

    def stop(stage, done, total):
        if done == total // 2:
            raise Stopped

    own, out = tmp_path / "own.py", tmp_path / "m"
    own.write_text(OWN)
    plan = replace(PLAN, network=f"{own}:Never")
    with pytest.raises(Stopped):
        measure("grid-2d:n=200", out=out, tasks=2, measures=["convergence"], plan=plan, progress=stop)
    own.write_text(OWN.replace("0 *", "1e-3 *"))
    with pytest.raises(InputError, match=r"interrupted run with other settings .network_file"):
        measure("grid-2d:n=200", out=out, tasks=2, measures=["convergence"], plan=plan)
    own.write_text(OWN)
    measure("grid-2d:n=200", out=out, tasks=2, measures=["convergence"], plan=plan)


def test_nothing_that_was_not_learned_is_called_easy_by_one_seed_either(tmp_path):
    plan = replace(PLAN, network="mlp:width=8", seeds=(0,), learning_rate=1e-12)
    found = measure("grid-2d:n=200", out=tmp_path, tasks=4, measures=["convergence"], plan=plan).ranking
    assert [sentence for sentence in found.verdict if ", easiest t" in sentence] == []


def test_of_one_seed_a_bound_is_a_bound():
    iterations = np.array([0, 1, 2, 4, 8, 16, 32, 64, 100])
    fast, slow = 10 * np.exp(-iterations / 4) + 1e-3, 10 * np.exp(-iterations / 300) + 1e-3
    rows = [
        {"task": k, "seed": 0, "iteration": i, "samples": i, "heldout_loss": 2 * e, "floor": 0.0, "floor_kind": "exact",
         "zero_loss": 20.1, "excess_nats": e, "excess_se": 1e-6}
        for k, curve in enumerate((fast, slow, slow)) for i, e in zip(iterations, curve, strict=True)
    ]  # fmt: skip
    table = convergence_table(pd.DataFrame(rows), 100)
    tasks = make_tasks(get_process("vp-linear"), 3)
    found = rank_tasks(
        convergence_estimates(table, 3), tasks, get_process("vp-linear"), dataset={}, grid="t", provenance={}
    )
    (said,) = [sentence for sentence in found.verdict if sentence.startswith("paper_style_floor: ")]
    assert "hardest t 334..1000 alike, easiest t 1..333" in said
