"""Agreement between results folders whose learning curves, and so whose answers, are known."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from learning_curves import BUDGET, FLOOR, exponential, losses_of
from scipy.stats import kendalltau, spearmanr

from difficulty.agreement import AGREEMENT_COLUMNS, agreement_sentences, agreement_table, rank_over_joint_floor
from difficulty.cli import SUBCOMMANDS
from difficulty.commandline import run_cli
from difficulty.convergence import convergence_table
from difficulty.errors import InputError
from difficulty.expert_plan import ExpertPlan
from difficulty.floors import over_floor
from difficulty.measurement_folder import rank_folder
from difficulty.process import get_process
from difficulty.process_file import write_process
from difficulty.rank_correlation import agreement_words, kendall, spearman
from difficulty.records import finish_run, start_run, write_array, write_table
from difficulty.stability import stability_table
from difficulty.tasks import make_tasks

DRAWS = 50


def measured(folder, curves, *, process="vp-linear", grid="t", seeds=(0, 1, 2), noise=0.0, data="a", floor=None):
    """A finished measurement of experts with the given excess curves; ``floor`` makes it a best known one."""
    forward = get_process(process)
    losses = losses_of(curves, seeds, noise)
    if floor is not None:
        losses = losses.assign(floor_kind="upper_bound", floor=floor, heldout_loss=floor + 2 * losses["excess_nats"])
    config = {
        "data": data, "process": process, "tasks": len(curves), "grid": grid, "measures": ["convergence"],
        "plan": asdict(ExpertPlan(seeds=seeds, budget=BUDGET, heldout_draws=DRAWS)), "estimator": "auto",
        "dataset_fingerprint": {"train": {"sha256": data}, "heldout": {"sha256": data, "shape": [DRAWS, 2]}},
        "process_fingerprint": forward.fingerprint,
    }  # fmt: skip
    run = start_run(folder, "measure", config)
    write_process(folder, forward)
    write_table(folder / "losses.csv", losses)
    write_table(folder / "convergence.csv", convergence_table(losses, BUDGET))
    write_table(folder / "stability.csv", stability_table(losses, BUDGET))
    if floor is not None:
        write_array(folder / "floor.npy", np.full((len(curves), DRAWS), floor, dtype=np.float32))
    finish_run(folder, run)
    return folder


def constant(excess):
    """Curves that fall to the given excess at once, one per task."""
    return [lambda i, e=e: e if i else 2 * e for e in excess]


def test_correlations_are_those_of_scipy_with_and_without_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 5, 12)).astype(float)
    for row in range(5):
        np.testing.assert_allclose(kendall(a, b)[row], kendalltau(a[row], b[row]).statistic)
        np.testing.assert_allclose(spearman(a, b)[row], spearmanr(a[row], b[row]).statistic)


def test_folders_with_the_same_order_agree_and_with_the_reverse_order_contradict_each_other(tmp_path):
    excess = 2.0 ** np.arange(8)
    a = measured(tmp_path / "a", constant(excess))
    b = measured(tmp_path / "b", constant(excess**2))
    c = measured(tmp_path / "c", constant(1 / excess))
    table = agreement_table([a, b, c]).set_index(["first", "second"])
    assert table.loc[("a", "b"), ["kendall", "spearman", "axis", "points"]].tolist() == [1, 1, "tasks", 8]
    assert table.loc[("a", "b"), "verdict"] == "agree"
    assert table.loc[("a", "c"), "verdict"] == "contradict each other"
    assert table.loc[("a", "c"), "kendall_high"] < 0


def test_experts_that_learned_nothing_are_not_said_to_agree(tmp_path):
    def compared(stuck):
        curves = constant(2.0 ** np.arange(8))
        curves[:stuck] = [lambda i, k=k: 2.0**k for k in range(stuck)]
        return agreement_table([measured(tmp_path / f"{name}{stuck}", curves) for name in "ab"])

    few, most = compared(3), compared(4)
    assert set(few["verdict"]) == {"agree"}
    assert set(most["verdict"]) == {"cannot be compared, since half of the tasks or more were not learned"}
    assert (most["kendall"] == 1).all()
    text = " ".join(rank_folder(tmp_path / "a4").verdict)
    assert "excess_nats and log_regret cannot be compared" in text


def test_bins_of_log_snr_take_means_of_values_and_not_of_their_logarithms(tmp_path):
    # Pairs of unlike tasks with the means 10, 20, 30, 40: their geometric means have another order.
    halves = [(10, 10), (1, 39), (30, 30), (2, 78)]
    options = {"process": "ve:T=800", "noise": 0.02}
    coarse = measured(tmp_path / "coarse", constant([10.0, 20.0, 30.0, 40.0]), **options)
    fine = measured(tmp_path / "fine", constant([float(x) for pair in halves for x in pair]), **options)
    row = agreement_table([coarse, fine]).iloc[0]
    assert (row["axis"], row["kendall"], row["verdict"]) == ("log-SNR", 1, "agree")


def test_seeds_are_not_compared_by_what_does_not_depend_on_them(tmp_path):
    folder = measured(tmp_path / "a", constant([1.0, 2.0, 4.0, 8.0]))
    t = np.arange(2, 1001)
    entropy = dict.fromkeys(("log_snr", "ci_low", "ci_high", "per_dlogsnr2"), 1.0) | {"kl": t * 1.0}
    write_table(folder / "relative_entropy.csv", pd.DataFrame({"t": t, **entropy, "valid": True}))
    run = json.loads((folder / "run.json").read_text())
    run["config"]["measures"].append("relative-entropy")
    (folder / "run.json").write_text(json.dumps(run))
    assert set(agreement_table([folder], ["excess_nats", "relative_entropy"])["measure"]) == {"excess_nats"}
    with pytest.raises(InputError, match="has no two seeds to compare by relative_entropy"):
        agreement_table([folder], ["relative_entropy"])


def test_the_words_for_an_interval_of_a_correlation_are_the_same_on_both_sides_of_zero():
    learned = np.ones(5, dtype=bool)
    assert [agreement_words(low, low + 0.1, learned) for low in (-0.9, -0.5, -0.15, -0.05, 0.05, 0.6, 0.75)] == [
        "contradict each other", "contradict each other in part", "contradict each other in part",
        "are not shown to agree", "agree in part", "agree in part", "agree",
    ]  # fmt: skip


def test_noisy_seeds_widen_the_interval_and_are_compared_with_one_another(tmp_path):
    curves = [exponential(500 * 1.05**k) for k in range(8)]
    quiet = agreement_table([measured(tmp_path / "quiet", curves, noise=0.001)])
    noisy = agreement_table([measured(tmp_path / "noisy", curves, noise=0.3)])
    assert len(quiet) == len(noisy) == 3
    assert (quiet["kendall"] == 1).all()
    assert noisy["kendall"].mean() < 0.9
    both = agreement_table([tmp_path / "quiet", tmp_path / "noisy"]).iloc[0]
    assert both["kendall_low"] < both["kendall"] <= both["kendall_high"]


@pytest.mark.parametrize("other", ["edm", "flow-matching", "vp-cosine"])
def test_one_density_over_log_snr_agrees_with_itself_under_another_process_and_grid(tmp_path, other):
    def cut(process, grid):
        tasks = make_tasks(get_process(process), 15, grid)
        middle = [0.5 * (max(task.log_snr_low, -14.0) + task.log_snr_high) for task in tasks]
        return constant(np.exp(-0.2 * (np.array(middle) + 1.0) ** 2) + 0.01)  # a peak inside, so no order of t

    a = measured(tmp_path / "a", cut("vp-linear", "log-snr"), grid="log-snr")
    b = measured(tmp_path / "b", cut(other, "log-snr"), process=other, grid="log-snr")
    row = agreement_table([a, b]).iloc[0]
    assert row["axis"] == "log-SNR"
    assert row["points"] == 15
    assert row["spearman"] > 0.9
    t_order = agreement_table([a, measured(tmp_path / "c", constant(np.arange(15.0, 0, -1)), process=other)]).iloc[0]
    assert t_order["spearman"] < 0.6


def test_without_an_exact_law_all_are_judged_over_the_best_floor_that_any_of_them_knows(tmp_path):
    # The second measurement never found how low the loss can go, so that its own excess calls the first task easy.
    honest = measured(tmp_path / "honest", constant([4.0, 2.0, 1.0, 0.5]), floor=FLOOR)
    poor = measured(tmp_path / "poor", constant([0.1, 2.0, 1.0, 0.5]), floor=FLOOR)
    losses = pd.read_csv(poor / "losses.csv")
    rows = losses["task"] == 0
    losses.loc[rows, ["floor", "heldout_loss", "zero_loss"]] += 8.0
    write_table(poor / "losses.csv", losses)
    floor = np.full((4, DRAWS), FLOOR, dtype=np.float32)
    floor[0] += 8.0
    write_array(poor / "floor.npy", floor)
    row = agreement_table([honest, poor]).iloc[0]
    assert row["kendall"] == 1
    before = pd.read_csv(poor / "convergence.csv")
    ranking = rank_over_joint_floor(poor, [honest])
    assert ranking.measures["excess_nats"].order == [3, 2, 1, 0]
    (source,) = ranking.provenance["floor_from"]
    assert source["folder"] == str(honest)
    after = pd.read_csv(poor / "convergence.csv")
    excess = after[after["definition"] == "excess_nats"]["value"]
    np.testing.assert_allclose(excess, [4.1, 2.0, 1.0, 0.5], rtol=1e-6)
    assert before[before["definition"] == "excess_nats"]["value"].iloc[0] == pytest.approx(0.1)
    # Once lowered, a floor does not change again.
    assert rank_over_joint_floor(poor, [honest]) == ranking


def test_folders_that_do_not_compare_are_refused(tmp_path):
    a = measured(tmp_path / "a", constant([1.0, 2.0, 3.0]))
    with pytest.raises(InputError, match="different data"):
        agreement_table([a, measured(tmp_path / "b", constant([1.0, 2.0, 3.0]), data="b")])
    with pytest.raises(InputError, match="no measure 'fid'; it has excess_nats"):
        agreement_table([a], ["fid"])
    with pytest.raises(InputError, match="has no two seeds to compare by excess_nats"):
        agreement_table([measured(tmp_path / "one", constant([1.0, 2.0, 3.0]), seeds=(0,))])
    with pytest.raises(InputError, match="no best known floor"):
        rank_over_joint_floor(a, [a])
    c = measured(tmp_path / "c", constant([1.0, 2.0, 3.0]), floor=FLOOR)
    d = measured(tmp_path / "d", constant([1.0, 2.0]), floor=FLOOR)
    with pytest.raises(InputError, match="was not judged on"):
        rank_over_joint_floor(c, [d])
    write_array(d / "floor.npy", np.zeros((3, 10), dtype=np.float32))
    with pytest.raises(InputError, match="has 2 tasks"):
        agreement_table([c, d])
    e = measured(tmp_path / "e", constant([1.0, 2.0, 3.0]), floor=FLOOR)
    write_array(e / "floor.npy", np.zeros((3, 10), dtype=np.float32))
    with pytest.raises(InputError, match="10 and on 50 draws"):
        agreement_table([c, e])
    (tmp_path / "kl").mkdir()
    finish_run(tmp_path / "kl", start_run(tmp_path / "kl", "kl", {}))
    with pytest.raises(InputError, match="was written by 'kl'"):
        agreement_table([a, tmp_path / "kl"])


def without_half(folder, name):
    table = pd.read_csv(folder / name)
    write_table(folder / name, table[: len(table) // 2])


def with_text(folder, name):
    write_table(folder / name, pd.read_csv(folder / name).assign(value="much"))


def without_config(folder, key):
    run = json.loads((folder / "run.json").read_text())
    del run["config"][key]
    (folder / "run.json").write_text(json.dumps(run))


def a_folder_instead(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()


@pytest.mark.parametrize("command", ["rank", "agree", "plot"])
@pytest.mark.parametrize(
    ("edit", "what", "message"),
    [
        (without_half, "losses.csv", "one row for each task, seed, iteration"),
        (without_half, "convergence.csv", "one row for each task, definition"),
        (without_half, "stability.csv", "one row for each definition, variant, task"),
        (without_half, "relative_entropy.csv", "one row for each t "),
        (with_text, "convergence.csv", "something else than float in column 'value'"),
        (a_folder_instead, "convergence.csv", "not a readable CSV table"),
        (without_config, "plan", "config.plan: Field required"),
        (without_config, "tasks", "config.tasks: Field required"),
    ],
)
def test_a_folder_that_was_edited_or_truncated_costs_one_sentence(tmp_path, capsys, command, edit, what, message):
    folder = measured(tmp_path / "a", [exponential(100), exponential(200), exponential(300)])
    t = np.arange(2, 1001)
    one = dict.fromkeys(("log_snr", "kl", "ci_low", "ci_high", "per_dlogsnr2"), 1.0)
    write_table(folder / "relative_entropy.csv", pd.DataFrame({"t": t, **one, "valid": True}))
    run = json.loads((folder / "run.json").read_text())
    run["config"]["measures"].append("relative-entropy")
    (folder / "run.json").write_text(json.dumps(run))
    edit(folder, what)
    assert run_cli(SUBCOMMANDS, "difficulty", "", [command, str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_sentences_or_json_and_writes_the_table(tmp_path, capsys):
    a = measured(tmp_path / "a", constant([1.0, 2.0, 4.0, 8.0]))
    b = measured(tmp_path / "b", constant([1.0, 2.0, 4.0, 8.0]), process="edm")

    def run(*args):
        return run_cli(SUBCOMMANDS, "difficulty", "", [str(arg) for arg in ("agree", *args)])

    assert run(a, b, "--out", tmp_path / "agreement.csv") == 0
    printed = capsys.readouterr().out.splitlines()
    table = pd.read_csv(tmp_path / "agreement.csv")
    assert printed == agreement_sentences(table)
    assert run(a, b, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == len(table) == 7
    assert run(a, tmp_path / "absent") == 2
    assert "is not a folder" in capsys.readouterr().err


def test_an_order_that_tells_no_tasks_apart_agrees_with_none():
    row = dict.fromkeys(AGREEMENT_COLUMNS, "a") | {"kendall": np.nan, "axis": "tasks", "points": 2}
    (said,) = agreement_sentences(pd.DataFrame([row]))
    assert said == "a and a, a: nothing to compare, since one of them tells no tasks apart."


def test_over_another_floor_the_error_grows_by_that_of_the_difference_of_the_floors():
    rng = np.random.default_rng(0)
    own, rows = 5 + rng.random((2, 40)), np.tile(np.arange(40), (2, 1))
    floor = own - 0.2 * rng.random((2, 40))
    table = pd.DataFrame({"task": [0, 1, 1], "heldout_loss": [7.0, 8.0, 5.0]})
    table = table.assign(floor=own.mean(1)[table["task"]], excess_nats=[1.0, 1.5, 0.0], excess_se=0.1)
    found = over_floor(table, own, floor, rows)
    between = 0.5 * (own - floor).std(1, ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(found["excess_se"], [0.1 + between[0], 0.1 + between[1], between[1]])
    np.testing.assert_allclose(found["excess_nats"], 0.5 * (table["heldout_loss"] - floor.mean(1)[table["task"]]))
