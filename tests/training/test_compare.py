import json

import numpy as np
import pandas as pd
import pytest
import torch

from difficulty.errors import InputError
from difficulty.process import get_process
from training.arms import ARMS, ArmSpec, choose_arms
from training.compare import FRESH, compare
from training.plots import draw_folder
from training.report import percent, write_report
from training.trainer import Trainer

SMALL = {"steps": 30, "batch": 8, "network": "mlp:width=8,depth=2", "samples": 64, "seeds": [0, 1]}


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
    assert set(table["metric"]) == {"nats", "loss", "fd-pca", "sw-pixels"}


def test_every_built_in_arm_trains_and_every_figure_is_drawn(gaussian, process, curriculum, tmp_path):
    compare(gaussian, process, list(ARMS), curriculum=curriculum, out=tmp_path, **SMALL)
    results = pd.read_csv(tmp_path / "comparison.csv")
    assert set(results["arm"]) == set(ARMS)
    assert results["value"].gt(0).all()
    paths = draw_folder(tmp_path)
    assert {path.name for path in paths} >= {"forest.png", "learning_curves.png", "task_differences.png", "stages.png"}
    assert all(path.stat().st_size > 1000 for path in paths)
    # a difference by another order of the same tasks, another density, and other seeds
    wide = results[results["metric"] == "loss"].pivot(index="arm", columns="seed", values="value")
    others = wide.drop(index="vanilla")
    assert (others.to_numpy() != wide.loc["vanilla"].to_numpy()).all()


def test_static_arm_has_the_histogram_of_the_curriculum_without_its_order(gaussian, process, curriculum, tmp_path):
    compare(gaussian, process, ["vanilla", "curriculum", "static"], curriculum=curriculum, out=tmp_path, **SMALL)
    ordered, static = (
        json.loads((tmp_path / "runs" / f"{arm}-seed0.json").read_text()) for arm in ("curriculum", "static")
    )
    assert np.allclose(ordered["exposure"], static["exposure"])
    assert len(ordered["stages"]) == 3
    assert len(static["stages"]) == 1


def test_interrupted_comparison_continues_with_what_is_missing_and_ends_the_same(
    gaussian, process, curriculum, tmp_path
):
    arms = ["vanilla", "curriculum", "static"]
    compare(gaussian, process, arms, curriculum=curriculum, out=tmp_path / "whole", **SMALL)

    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(gaussian, process, arms, curriculum=curriculum, out=tmp_path / "cut", progress=stop, **SMALL)
    assert not (tmp_path / "cut" / "effects.csv").exists()
    seen = []
    compare(
        gaussian, process, arms, curriculum=curriculum, out=tmp_path / "cut",
        progress=lambda what, done, total: seen.append(done), **SMALL,
    )  # fmt: skip
    assert seen == [3, 4, 5, 6]
    assert _tables(tmp_path / "cut") == _tables(tmp_path / "whole")


def test_worker_processes_give_the_numbers_of_one_process(gaussian, curriculum, tmp_path):
    # a process with a closed form, which a worker cannot be sent
    process = get_process("edm:T=80")
    for workers in (1, 2):
        compare(
            gaussian, process, ["vanilla", "vanilla-again", "log-normal"], out=tmp_path / str(workers),
            workers=workers, prediction="edm", **SMALL,
        )  # fmt: skip
    assert _tables(tmp_path / "1") == _tables(tmp_path / "2")


def test_repeat_of_vanilla_trains_with_seeds_of_its_own(gaussian, process, tmp_path):
    compare(gaussian, process, ["vanilla", "vanilla-again"], out=tmp_path, **SMALL)
    again = json.loads((tmp_path / "runs" / "vanilla-again-seed0.json").read_text())
    assert again["seed"] == 0
    direct = compare(
        gaussian, process, {"a": ArmSpec(), "b": ArmSpec(weight="eps")}, out=tmp_path / "direct",
        **(SMALL | {"seeds": [FRESH]}),
    )  # fmt: skip
    assert (direct["verdict"] == "one seed, no interval").all()
    fresh = json.loads((tmp_path / "direct" / "runs" / f"a-seed{FRESH}.json").read_text())
    assert fresh["final"] == again["final"]


def test_random_order_differs_between_seeds_and_holds_the_same_clusters(curriculum, process):
    spec = choose_arms(["random"], curriculum, process, 100)["random"]
    orders = {tuple(tuple(c.tasks) for c in spec.curriculum_for(seed).clusters) for seed in range(60)}
    assert len(orders) == 6  # all orders of three clusters
    assert {frozenset(order) for order in orders} == {frozenset(tuple(c.tasks) for c in curriculum.clusters)}


def test_report_states_every_effect_with_its_interval_as_in_the_table(gaussian, process, curriculum, tmp_path):
    arms = ["vanilla", "vanilla-again", "curriculum", "static"]
    table = compare(gaussian, process, arms, curriculum=curriculum, out=tmp_path, **SMALL)
    draw_folder(tmp_path)
    markdown, page = (path.read_text() for path in write_report(tmp_path))
    for row in table.to_dict("records"):
        for name in ("log_ratio", "ci_low", "ci_high"):
            assert percent(row[name]) in markdown
            assert percent(row[name]) in page
    assert "no claim rests on these seeds" in markdown
    assert "curriculum against its own histogram of t without order" in markdown
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
        ({"arms": ["vanilla", "log-snr"]}, "did not explore arm 'log-snr'"),
    ):
        with pytest.raises(InputError, match=reason):
            confirm(**changes)
        assert not (tmp_path / "new").exists()
    confirm(arms=["vanilla", "p2"])
    assert "Confirmation: the seeds differ" in write_report(tmp_path / "new")[0].read_text()


def test_report_of_an_unfinished_comparison_is_refused(gaussian, process, tmp_path):
    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(gaussian, process, ["vanilla", "p2"], out=tmp_path, progress=stop, **SMALL)
    with pytest.raises(InputError, match="incomplete"):
        write_report(tmp_path)


def test_arm_that_diverges_is_named_and_finished_runs_are_kept(gaussian, process, tmp_path, monkeypatch):
    step = Trainer.step

    def poisoned(trainer):
        if trainer.plan.weight == "p2" and trainer.done == 5:
            trainer.source.samples = torch.full_like(trainer.source.samples, float("nan"))
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(InputError, match=r"arm 'p2' with seed 0: the loss became nan at step 5.* runs are kept"):
        compare(gaussian, process, ["vanilla", "p2"], out=tmp_path, **SMALL)
    assert (tmp_path / "runs" / "vanilla-seed0.json").exists()
    assert not (tmp_path / "effects.csv").exists()


def test_comparison_refuses_what_it_cannot_do(gaussian, process, curriculum, tmp_path):
    for arms, options, reason in (
        (["vanilla"], {}, "two arms"),
        (["vanilla", "best"], {}, "unknown arm"),
        (["vanilla", "curriculum"], {}, "needs a curriculum"),
        (["vanilla", "static"], {"curriculum": curriculum}, "add that arm"),
        (["vanilla", "min-snr"], {"seeds": [1, 1]}, "different whole numbers"),
        (["vanilla", "min-snr"], {"metrics": ["fid"]}, "unknown metric"),
        (["vanilla", "min-snr"], {"metrics": ["kid-pca"]}, "no ratio"),
    ):
        with pytest.raises(InputError, match=reason):
            compare(gaussian, process, arms, out=tmp_path / "new", **(SMALL | options))
    compare(gaussian, process, ["vanilla", "min-snr"], out=tmp_path / "done", **SMALL)
    with pytest.raises(InputError, match="other settings"):
        compare(gaussian, process, ["vanilla", "min-snr"], out=tmp_path / "done", **(SMALL | {"steps": 31}))
    with pytest.raises(InputError, match="noise levels differ"):
        compare(gaussian, get_process("vp-cosine:T=80"), ["vanilla", "curriculum"], curriculum=curriculum,
                out=tmp_path / "other", **SMALL)  # fmt: skip
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "other").exists()
