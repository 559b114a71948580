import json

import numpy as np
import pandas as pd
import pytest
import torch

from difficulty.datasets import load_dataset
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError
from difficulty.process import get_process
from training import jobs, trainer
from training.arms import ARMS, ArmSpec, choose_arms
from training.batched import Stacked
from training.compare import compare
from training.curriculum_builders import interval_curriculum
from training.effects import effects
from training.excess import Excess
from training.heldout import HeldOut
from training.jobs import FRESH
from training.plots import draw_folder
from training.plots_comparison import COMPARISON_FIGURES, forest
from training.report import order_or_exposure, percent, write_report

OWN = """
class Own(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(4, 4), torch.nn.Tanh())

    def forward(self, x, log_snr):
        return super().forward(x)
"""
SMALL = {"steps": 30, "batch": 8, "network": "mlp:width=8,depth=2", "samples": 64, "seeds": [0, 1]}


@pytest.fixture(autouse=True)
def few_evaluations(monkeypatch):
    """Points of a learning curve; with thirty iterations twenty of them would be most of the work."""
    monkeypatch.setattr(jobs, "EVALUATIONS", 3)


def _tables(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.csv"))}


def test_arm_with_all_tasks_in_one_cluster_differs_from_plain_training_by_exactly_zero(
    gaussian, process, one_cluster, tmp_path
):
    table = compare(
        gaussian, process, {"vanilla": ArmSpec(), "one cluster": ArmSpec(one_cluster)}, out=tmp_path, **SMALL
    )
    assert (table["log_ratio"] == 0).all()
    assert (table["verdict"] == "no difference shown").all()
    assert set(table["metric"]) == {"nats", "excess", "loss", "fd-pca", "sw-pixels"}


def test_every_built_in_arm_trains(gaussian, process, ranking, curriculum, tmp_path):
    names = [*ARMS, "curriculum+soft-min-snr:gamma=3", "measured+p2"]
    compare(gaussian, process, names, ranking=ranking, curriculum=curriculum, out=tmp_path, **SMALL)
    results = pd.read_csv(tmp_path / "comparison.csv")
    assert set(results["arm"]) == set(names)
    assert results["value"].gt(0).all()
    # a difference by another order of the same tasks, another density, and other seeds
    wide = results[results["metric"] == "loss"].pivot(index="arm", columns="seed", values="value")
    others = wide.drop(index="vanilla")
    assert (others.to_numpy() != wide.loc["vanilla"].to_numpy()).all()


def test_static_arm_has_the_histogram_of_the_curriculum_without_its_order(gaussian, process, curriculum, tmp_path):
    compare(gaussian, process, ["vanilla", "curriculum", "static"], curriculum=curriculum, out=tmp_path, **SMALL)
    ordered, static = (
        json.loads((tmp_path / "runs" / f"{arm}-cosine-seed0.json").read_text()) for arm in ("curriculum", "static")
    )
    assert np.allclose(ordered["exposure"], static["exposure"])
    assert len(ordered["stages"]) == 3
    assert len(static["stages"]) == 1


def test_interrupted_comparison_continues_with_what_is_missing_and_ends_the_same(
    gaussian, process, curriculum, tmp_path, monkeypatch
):
    monkeypatch.setattr(jobs, "LARGEST_GROUP", 2)
    arms = ["vanilla", "curriculum", "static"]
    compare(gaussian, process, arms, curriculum=curriculum, out=tmp_path / "whole", **SMALL)

    def stop(what, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(gaussian, process, arms, curriculum=curriculum, out=tmp_path / "cut", progress=stop, **SMALL)
    assert not (tmp_path / "cut" / "effects.csv").exists()
    seen = []
    compare(
        gaussian, process, arms, curriculum=curriculum, out=tmp_path / "cut",
        progress=lambda what, done, total: seen.append(done), **SMALL,
    )  # fmt: skip
    assert seen == [2, 4, 4, 6]  # also before the first group of each part ends
    assert _tables(tmp_path / "cut") == _tables(tmp_path / "whole")


def test_group_that_was_killed_goes_on_from_its_checkpoint(gaussian, process, curriculum, tmp_path, monkeypatch):
    def go(out, **options):
        return compare(gaussian, process, ["vanilla", "curriculum"], curriculum=curriculum, out=out, **SMALL | options)

    go(tmp_path / "whole")
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    step, seen = Stacked.step, []

    def killed(together):
        seen.append(together.trainers[0].done)
        if seen[-1] == 17 and len(seen) == 18:
            raise KeyboardInterrupt
        step(together)

    monkeypatch.setattr(Stacked, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut")
    go(tmp_path / "cut")
    assert seen == [*range(18), *range(17, 30)]
    assert _tables(tmp_path / "cut") == _tables(tmp_path / "whole")
    assert not (tmp_path / "cut" / "partial").exists()


def test_worker_processes_give_the_numbers_of_one_process(gaussian, curriculum, tmp_path):
    # a process with a closed form, which a worker cannot be sent
    process = get_process("edm:T=80")
    for workers in (1, 2):
        compare(
            gaussian, process, ["vanilla", "vanilla-again", "log-normal"], out=tmp_path / str(workers),
            workers=workers, prediction="edm", **SMALL,
        )  # fmt: skip
    # the groups are smaller with two workers, which changes the rounding and nothing else
    one, two = (pd.read_csv(tmp_path / str(workers) / "comparison.csv") for workers in (1, 2))
    assert (one[["arm", "seed", "metric"]] == two[["arm", "seed", "metric"]]).all(axis=None)
    assert np.allclose(one["value"], two["value"], rtol=1e-3)


def test_repeat_of_vanilla_trains_with_seeds_of_its_own(gaussian, process, tmp_path):
    compare(gaussian, process, ["vanilla", "vanilla-again"], out=tmp_path, **SMALL)
    again = json.loads((tmp_path / "runs" / "vanilla-again-cosine-seed0.json").read_text())
    assert again["seed"] == 0
    direct = compare(
        gaussian, process, {"a": ArmSpec(), "b": ArmSpec(weight="eps")}, out=tmp_path / "direct",
        **(SMALL | {"seeds": [FRESH]}),
    )  # fmt: skip
    assert (direct["verdict"] == "one seed, no interval").all()
    fresh = json.loads((tmp_path / "direct" / "runs" / f"a-cosine-seed{FRESH}.json").read_text())
    assert fresh["final"] == again["final"]


def test_only_a_repeat_of_the_baseline_is_a_noise_floor(gaussian, process, tmp_path):
    arms = ["p2", "vanilla-again", "vanilla-again+p2", "vanilla-again+min-snr"]
    table = compare(gaussian, process, arms, out=tmp_path, **SMALL)
    floors = table[table["verdict"] == "noise floor (A/A)"]
    assert set(floors["arm"]) == {"vanilla-again+p2"}
    assert table.loc[table["arm"] != "vanilla-again+p2", "p_holm"].notna().all()
    half_width = 0.5 * (floors["ci_high"] - floors["ci_low"])
    assert np.allclose(table.loc[table["arm"] == "vanilla-again", "noise_floor"], half_width)


def test_order_is_judged_against_the_same_exposure_with_the_same_weight(gaussian, process, curriculum, tmp_path):
    arms = ["vanilla", "curriculum", "static", "static+p2"]
    compare(gaussian, process, arms, curriculum=curriculum, out=tmp_path, **SMALL)
    order = pd.read_csv(tmp_path / "order.csv")
    assert not order["metric"].duplicated().any()
    wide = pd.read_csv(tmp_path / "comparison.csv").pivot(index=["metric", "seed"], columns="arm", values="value")
    expected = np.log(wide["curriculum"] / wide["static"]).groupby("metric").mean()
    assert np.allclose(order.set_index("metric")["log_ratio"], expected[order["metric"]])
    exposure = pd.read_csv(tmp_path / "effects.csv").query("arm == 'static' and metric == 'nats'").iloc[0]
    both = order.query("metric == 'nats'").iloc[0]
    effect = pd.read_csv(tmp_path / "effects.csv").query("arm == 'curriculum' and metric == 'nats'").iloc[0]
    answer = order_or_exposure(effect["verdict"], both["verdict"], exposure["verdict"])
    assert f"curriculum, nats, learning rate cosine: {answer} (against its own" in write_report(tmp_path)[0].read_text()


def test_files_of_runs_and_settings_that_were_edited_cost_one_sentence(gaussian, process, tmp_path):
    arms = ["vanilla", "p2"]
    compare(gaussian, process, arms, out=tmp_path, **SMALL)
    run = next((tmp_path / "runs").glob("*.json"))
    kept = run.read_text()
    for content in ("{}", "[]"):
        run.write_text(content)
        with pytest.raises(InputError, match=f"{run.name} is not the file of a finished run; delete it"):
            compare(gaussian, process, arms, out=tmp_path, **SMALL)
    run.write_text(kept)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match="holds the results of another command"):
        compare(gaussian, process, arms, out=tmp_path, **SMALL)


def test_a_comparison_of_one_task_that_ends_in_pure_noise_is_drawn(gaussian, tmp_path):
    process = get_process("flow-matching:T=40")
    one = interval_curriculum(process, k=1)
    compare(gaussian, process, {"vanilla": ArmSpec(), "one": ArmSpec(one)}, curriculum=one, out=tmp_path, **SMALL)
    assert draw_folder(tmp_path)


def test_an_arm_takes_a_weight_with_learned_uncertainty(process):
    arms = choose_arms(["vanilla+min-snr+uncertainty"], None, process, 30)
    assert arms["vanilla+min-snr+uncertainty"].weight == "min-snr+uncertainty"
    with pytest.raises(InputError, match="two loss weights"):
        choose_arms(["p2+min-snr"], None, process, 30)


def test_runs_on_data_that_are_not_in_memory_are_trained_alone_and_continued(tmp_path, process, monkeypatch):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    Image = pytest.importorskip("PIL.Image")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{i:03d}.png")
    data = load_dataset(tmp_path, resident=40)
    assert data.large is not None
    options = SMALL | {"samples": 40, "metrics": ["sw-pixels"]}
    table = compare(data, process, ["vanilla", "p2"], out=tmp_path / "c", **options)
    assert set(table["metric"]) == {"nats", "loss", "sw-pixels"}


def test_order_is_told_of_a_baseline_too(gaussian, process, curriculum, tmp_path):
    compare(gaussian, process, ["curriculum", "static"], curriculum=curriculum, out=tmp_path, **SMALL)
    text = write_report(tmp_path)[0].read_text()
    assert "one of the two is the baseline, so nothing else is known of curriculum and static (against its own" in text


def test_arms_that_would_share_a_file_are_refused_before_anything_is_written(gaussian, process, tmp_path):
    with pytest.raises(InputError, match="arms 'a/c' and 'a-c' would share one file"):
        compare(gaussian, process, {"a/c": ArmSpec(), "a-c": ArmSpec(weight="p2")}, out=tmp_path / "new", **SMALL)
    assert not (tmp_path / "new").exists()


def test_marker_of_a_repeat_beyond_the_limits_points_at_its_place(gaussian, process, tmp_path):
    compare(gaussian, process, ["vanilla", "vanilla-again", "p2"], out=tmp_path, **SMALL)
    table = pd.read_csv(tmp_path / "effects.csv")
    judged = table["arm"] == "p2"
    table.loc[judged, ["log_ratio", "ci_low", "ci_high"]] = [0.0, -0.001, 0.001]
    table.loc[~judged, ["log_ratio", "ci_low", "ci_high"]] = [0.5, 0.4, 0.6]
    table.to_csv(tmp_path / "effects.csv", index=False)
    for ax in forest(tmp_path).axes:
        right = ax.get_xlim()[1]
        assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == ">"] == [right]


def test_random_order_differs_between_seeds_and_holds_the_same_clusters(curriculum, process):
    spec = choose_arms(["random"], curriculum, process, 100)["random"]
    orders = {tuple(tuple(c.tasks) for c in spec.curriculum_for(seed).clusters) for seed in range(60)}
    assert len(orders) == 6  # all orders of three clusters
    assert {frozenset(order) for order in orders} == {frozenset(tuple(c.tasks) for c in curriculum.clusters)}


def test_report_states_every_effect_with_its_interval_as_in_the_table(gaussian, process, curriculum, tmp_path):
    arms = ["vanilla", "vanilla-again", "curriculum", "static"]
    table = compare(gaussian, process, arms, curriculum=curriculum, out=tmp_path, **SMALL)
    paths = draw_folder(tmp_path)
    assert {path.stem for path in paths} == set(COMPARISON_FIGURES)
    assert all(path.stat().st_size > 1000 for path in paths)
    markdown, page = (path.read_text() for path in write_report(tmp_path))
    for row in table.to_dict("records"):
        for name in ("log_ratio", "ci_low", "ci_high"):
            assert percent(row[name]) in markdown
            assert percent(row[name]) in page
    assert "no claim rests on these seeds" in markdown
    assert "against its own histogram of t without order" in markdown
    order = pd.read_csv(tmp_path / "order.csv")
    wide = pd.read_csv(tmp_path / "comparison.csv").pivot(index=["metric", "seed"], columns="arm", values="value")
    expected = np.log(wide["curriculum"] / wide["static"]).groupby("metric").mean()
    assert np.allclose(order.set_index("metric")["log_ratio"], expected[order["metric"]])
    assert page.count("data:image/png;base64,") == len(list((tmp_path / "figures").glob("*.png")))
    assert 'src="http' not in page


def test_confirmation_repeats_the_setting_on_other_seeds_or_is_refused(gaussian, process, tmp_path):
    arms = ["vanilla", "min-snr", "p2"]
    compare(gaussian, process, arms, out=tmp_path / "explored", **SMALL)

    def confirm(arms=arms, **changes):
        options = SMALL | {"seeds": [5, 6]} | changes
        return compare(gaussian, process, arms, out=tmp_path / "new", confirms=tmp_path / "explored", **options)

    for changes, reason in (
        ({"seeds": [1, 2]}, "seed 1 was explored"),
        ({"steps": 31}, "another plan"),
        ({"arms": {"vanilla": ArmSpec(), "p2": ArmSpec(weight="min-snr")}}, "another arm 'p2'"),
        ({"arms": ["p2", "vanilla"]}, "another baseline"),
    ):
        with pytest.raises(InputError, match=reason):
            confirm(**changes)
        assert not (tmp_path / "new").exists()
    confirm(arms=["vanilla", "p2"])
    compare(gaussian, process, arms, out=tmp_path / "explored", **SMALL)  # repeated, it is the same exploration
    confirm(arms=["vanilla", "p2"])
    with pytest.raises(InputError, match=r"other settings \(baseline vanilla -> p2"):
        compare(gaussian, process, ["p2", "vanilla", "min-snr"], out=tmp_path / "explored", **SMALL)
    assert "Confirmation: the seeds differ" in write_report(tmp_path / "new")[0].read_text()


def test_report_of_an_unfinished_comparison_is_refused(gaussian, process, tmp_path):
    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(gaussian, process, ["vanilla", "p2"], out=tmp_path, progress=stop, **SMALL)
    with pytest.raises(InputError, match="incomplete"):
        write_report(tmp_path)


@pytest.mark.parametrize("largest", [1, 16])
def test_arm_that_diverges_is_named_and_finished_runs_are_kept(gaussian, process, tmp_path, monkeypatch, largest):
    monkeypatch.setattr(jobs, "LARGEST_GROUP", largest)
    tables = trainer.loss_weights
    monkeypatch.setattr(
        trainer, "loss_weights", lambda name, *rest: tables(name, *rest) * (np.nan if name == "p2" else 1.0)
    )
    with pytest.raises(InputError, match=r"arm 'p2' with seed 0: the loss became nan at step 0.* runs are kept"):
        compare(gaussian, process, ["vanilla", "p2"], out=tmp_path, **SMALL)
    assert (tmp_path / "runs" / "vanilla-cosine-seed0.json").exists() == (largest == 1)
    assert not (tmp_path / "effects.csv").exists()


def test_arm_whose_samples_are_not_numbers_is_named(gaussian, process, tmp_path, monkeypatch):
    drawn = jobs.draw_samples
    monkeypatch.setattr(jobs, "draw_samples", lambda *given, seed, **more: drawn(*given, seed=seed, **more) / seed)
    with pytest.raises(InputError, match=r"arm 'vanilla' with seed 0: the samples hold NaN or inf.* runs are kept"):
        compare(gaussian, process, ["vanilla", "p2"], out=tmp_path, **SMALL)


def test_both_learning_rate_schedules_are_compared_each_with_its_own_baseline(gaussian, process, tmp_path):
    table = compare(
        gaussian, process, ["vanilla", "p2"], out=tmp_path / "both", lr_schedules=["constant", "cosine"], **SMALL
    )
    assert set(table["lr_schedule"]) == {"constant", "cosine"}
    for name in ("constant", "cosine"):
        alone = compare(gaussian, process, ["vanilla", "p2"], out=tmp_path / name, lr_schedules=[name], **SMALL)
        same = table[table["lr_schedule"] == name].reset_index(drop=True)
        assert np.allclose(same["log_ratio"], alone["log_ratio"])
    with pytest.raises(InputError, match="unknown learning-rate schedule"):
        compare(gaussian, process, ["vanilla", "p2"], out=tmp_path / "new", lr_schedules=["wsd"], **SMALL)


def test_runs_in_a_batched_program_give_the_numbers_of_runs_one_by_one(
    gaussian, process, curriculum, tmp_path, monkeypatch
):
    arms = ["vanilla", "vanilla-again", "curriculum", "log-snr", "p2"]
    tables = {}
    for largest in (1, 16):
        monkeypatch.setattr(jobs, "LARGEST_GROUP", largest)
        compare(gaussian, process, arms, curriculum=curriculum, out=tmp_path / str(largest), **SMALL)
        tables[largest] = pd.read_csv(tmp_path / str(largest) / "comparison.csv")
    assert np.allclose(tables[1]["value"], tables[16]["value"], rtol=1e-3)


def test_excess_is_zero_for_the_posterior_mean_and_what_nats_exceed_theirs_by(gaussian, process, ranking):
    class Exact(torch.nn.Module):
        """eps of the posterior mean of N(0, 1/4), per unit of the scaled input."""

        def forward(self, x, log_snr):
            snr = log_snr.exp()[:, None]
            return shift * log_snr.sigmoid()[:, None] + x * (0.25 * snr + 1).rsqrt()

    held = HeldOut(gaussian, process, ranking.tasks, draws=40000)
    excess = Excess(held, gaussian, process)
    nats = []
    for shift in (0.0, 0.3):
        exact = Denoiser(Exact(), process, "eps", 0.5, baseline=False)
        nats.append(held.evaluate(exact).nats)
        # An error of shift s(lambda) in each of 4 dimensions, s' = s (1 - s): of s^2 the integral is log(1 + snr) - s.
        snr = np.exp(process.log_snr([80, 1]))
        noisiest, first = np.log1p(snr) - snr / (1 + snr)
        assert excess(exact) == pytest.approx(0.5 * 4 * shift**2 * (first - noisiest), rel=3e-3, abs=1e-6)
    # the difference of two losses on the same draws holds a cross term that vanishes on average only
    assert nats[1] - nats[0] == pytest.approx(excess(exact), rel=0.1)


def test_arms_of_forty_seeds_that_differ_by_nothing_but_seeds_are_not_told_apart_more_often_than_stated(
    process, tmp_path
):
    data = load_dataset("grid-2d:n=400")
    compare(
        data, process, ["vanilla", "vanilla-again"], seeds=range(40), steps=25, out=tmp_path, batch=8,
        network="mlp:width=8,depth=1", samples=64,
    )  # fmt: skip
    final = pd.read_csv(tmp_path / "comparison.csv")
    # as 10 comparisons of 4 seeds, in which the repeat is judged like any arm
    claims = []
    for first in range(0, 40, 4):
        own = final[final["seed"].between(first, first + 3)]
        claims.append(not (effects(own, "vanilla")["verdict"] == "no difference shown").all())
    # at the nominal 5 % three claims in ten happen once in a hundred times
    assert sum(claims) <= 2
    whole = effects(final, "vanilla")
    assert (whole["verdict"] == "no difference shown").all()


def test_swapping_the_names_of_two_arms_flips_signs_and_nothing_else(gaussian, process, tmp_path):
    one, other = ArmSpec(), ArmSpec(weight="p2")
    forward = compare(gaussian, process, {"a": one, "b": other}, out=tmp_path / "1", **SMALL)
    backward = compare(gaussian, process, {"a": other, "b": one}, out=tmp_path / "2", **SMALL)
    assert np.allclose(forward["log_ratio"], -backward["log_ratio"], rtol=1e-3, atol=1e-6)
    assert np.allclose(forward["ci_low"], -backward["ci_high"], rtol=1e-3, atol=1e-6)
    assert np.allclose(forward[["p", "p_holm", "mde"]], backward[["p", "p_holm", "mde"]], rtol=1e-2, atol=1e-6)
    assert (forward["verdict"] == backward["verdict"]).all()


@pytest.mark.parametrize(
    ("effect", "order", "exposure", "answer"),
    [
        ("helps", "helps", "no difference shown", "helps, by its order"),
        ("hurts", "no difference shown", "hurts, by less than 1 %", "hurts, by its exposure"),
        ("helps", "helps", "helps", "helps, by its order and by its exposure"),
        ("helps", "hurts", "no difference shown", "helps; whether by order or by exposure these seeds do not tell"),
        ("no difference shown", "hurts", "helps", "no difference shown, so there is nothing to explain"),
    ],
)
def test_order_or_exposure_is_said_from_three_verdicts(effect, order, exposure, answer):
    assert order_or_exposure(effect, order, exposure) == answer


def test_comparison_refuses_what_it_cannot_do(gaussian, process, curriculum, tmp_path):
    for arms, options, reason in (
        (["vanilla"], {}, "two arms"),
        (["vanilla", "best"], {}, "unknown arm"),
        (["vanilla", "curriculum"], {}, "needs a curriculum"),
        (["vanilla", "static"], {"curriculum": curriculum}, "add that arm"),
        (["vanilla", "min-snr"], {"seeds": [1, 1]}, "different whole numbers"),
        (["vanilla", "min-snr"], {"metrics": ["fid"]}, "unknown metric"),
        (["vanilla", "min-snr"], {"metrics": ["kid-pca"]}, "no ratio"),
        (["vanilla", "min-snr"], {"samples": 0}, "at least 40 samples, got 0"),
        (["vanilla", "min-snr"], {"samples": 10}, "at least 40 samples, got 10"),
    ):
        with pytest.raises(InputError, match=reason):
            compare(gaussian, process, arms, out=tmp_path / "new", **(SMALL | options))
    compare(gaussian, process, ["vanilla", "min-snr"], out=tmp_path / "done", **SMALL)
    with pytest.raises(InputError, match="other settings"):
        compare(gaussian, process, ["vanilla", "min-snr"], out=tmp_path / "done", **(SMALL | {"steps": 31}))
    (tmp_path / "own.py").write_text("import torch\ndef make(shape): return Own()\n" + OWN)
    own = SMALL | {"network": f"{tmp_path / 'own.py'}:make"}
    compare(gaussian, process, ["vanilla", "min-snr"], out=tmp_path / "own", **own)
    (tmp_path / "own.py").write_text("import torch\ndef make(shape): return Own()\n" + OWN.replace("Tanh", "SiLU"))
    with pytest.raises(InputError, match=r"other settings \(network_file"):
        compare(gaussian, process, ["vanilla", "min-snr"], out=tmp_path / "own", **own)
    with pytest.raises(InputError, match="noise levels differ"):
        compare(gaussian, get_process("vp-cosine:T=80"), ["vanilla", "curriculum"], curriculum=curriculum,
                out=tmp_path / "other", **SMALL)  # fmt: skip
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "other").exists()
