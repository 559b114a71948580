from dataclasses import replace

import numpy as np
import pytest
import torch

from difficulty.datasets import split_samples
from difficulty.errors import InputError
from difficulty.networks import NETWORKS, build_network
from difficulty.process import get_process
from training.accuracy import ClassJudge
from training.commands.condition import told_of
from training.conditional import Classes, Guided, LabelledNetwork, given
from training.heldout import HeldOut
from training.run import Cadence, restore, train
from training.sampling import draw_samples
from training.trainer import Trainer, TrainPlan

PLAN = TrainPlan(steps=300, batch=64, network="mlp:width=32,depth=2", prediction="v", lr=5e-3, condition="class")


@pytest.fixture(scope="module")
def process():
    # Ends in pure noise, where samplers start; 80 steps of the linear schedule do not.
    return get_process("vp-cosine:T=80")


@pytest.fixture(scope="module")
def two_classes():
    """Points around (-1, 0) and (1, 0), labelled 0 and 1."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    points = 0.2 * rng.normal(size=(600, 2)) + np.c_[2 * labels - 1, np.zeros(600)]
    return split_samples("two classes", points, labels=labels)


@pytest.fixture(scope="module")
def trained(two_classes, process):
    torch.set_num_threads(1)
    trainer = Trainer(two_classes, process, PLAN)
    for _ in range(PLAN.steps):
        trainer.step()
    return trainer


@pytest.mark.parametrize("name", NETWORKS)
def test_untrained_labels_say_nothing(name):
    shape = (1, 8, 8)
    network = LabelledNetwork(build_network(name, shape, 0), 10)
    for parameter in network.network.parameters():  # zero-initialised outputs would hide everything
        if (parameter == 0).all() and parameter.shape[0] != 11:
            torch.nn.init.normal_(parameter, std=0.1)
    x, log_snr = torch.randn(6, *shape), torch.linspace(-3, 3, 6)
    plain = network(x, log_snr)
    assert torch.equal(plain, network(x, log_snr, torch.arange(6)))
    torch.nn.init.normal_(network.network.embedding.part.label.weight)
    assert not torch.allclose(network(x, log_snr), network(x, log_snr, torch.arange(6)))


def test_conditional_samples_are_of_the_class_that_was_asked_for(trained, two_classes):
    labels = torch.arange(400) % 2
    samples = draw_samples(trained.ema, 400, (2,), seed=0, condition=labels)
    judge = ClassJudge(two_classes)
    obeyed = judge(samples, labels)
    assert obeyed["group"].tolist() == ["all", "class", "class"]
    assert (obeyed["ci_low"] > 0.93).all()
    assert obeyed["accuracy"].between(obeyed["ci_low"], obeyed["ci_high"]).all()
    assert judge.heldout > 0.99


def test_accuracy_counts_per_class_and_caption_with_wilsons_interval(two_classes):
    # 30 samples asked to be left and 10 to be right; 6 and 1 of them are on the other side.
    sides = torch.tensor([-1.0] * 24 + [1.0] * 6 + [1.0] * 9 + [-1.0])
    labels = torch.tensor([0] * 30 + [1] * 10)
    captions = ["left"] * 20 + ["to the left"] * 10 + ["right"] * 10
    found = ClassJudge(two_classes)(torch.stack([sides, torch.zeros(40)], 1), labels, captions).set_index("value")
    assert found["samples"].tolist() == [40, 30, 10, 20, 10, 10]
    assert found["accuracy"].tolist() == pytest.approx([33 / 40, 0.8, 0.9, 1.0, 0.4, 0.9])
    # Wilson 1927: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = 0.8, n = 30, z = 1.96
    assert found.loc["0", ["ci_low", "ci_high"]].tolist() == pytest.approx([0.6269, 0.9050], abs=2e-4)


def test_a_sample_of_no_number_is_of_no_class(two_classes):
    samples = torch.tensor([[-1.0, 0.0], [torch.nan, 0.0], [-1.0, torch.inf]])
    assert ClassJudge(two_classes)(samples, torch.zeros(3, dtype=torch.int64))["accuracy"].tolist() == [1 / 3] * 2


def test_large_samples_are_classified_a_few_at_a_time(two_classes, monkeypatch):
    judge = ClassJudge(two_classes).judge
    whole = judge.predict(two_classes.heldout)
    monkeypatch.setattr("training.classifier.CHUNK_VALUES", 6)
    sizes = []
    judge.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    assert torch.equal(judge.predict(two_classes.heldout), whole)
    assert max(sizes) == 3


def test_data_of_other_classes_than_the_runs_are_refused(two_classes, tmp_path):
    facts = Classes(two_classes).facts
    config = {"condition": facts, "data": two_classes.fingerprint}
    assert told_of(tmp_path, config, two_classes, None).classes == 2
    labels = torch.arange(len(two_classes.train)) % 3
    three = replace(two_classes, labels=labels, heldout_labels=torch.arange(len(two_classes.heldout)) % 3)
    with pytest.raises(InputError, match="was trained on 2 classes, 'two classes' has 3"):
        told_of(tmp_path, config, three, None)


def test_labels_that_were_exchanged_are_said(two_classes, tmp_path, capsys):
    config = {"condition": Classes(two_classes).facts, "data": two_classes.fingerprint}
    told_of(tmp_path, config, replace(two_classes, labels=1 - two_classes.labels), None)
    assert "the labels of two classes are not those" in capsys.readouterr().err


def test_without_labels_the_same_network_samples_both_classes(trained, two_classes):
    samples = draw_samples(trained.ema, 400, (2,), seed=0)
    assert 0.3 < float((samples[:, 0] > 0).float().mean()) < 0.7


def test_guidance_is_linear_between_the_unconditional_and_the_conditional_estimate(trained):
    x, t, labels = torch.randn(8, 2), torch.full((8,), 60), torch.arange(8) % 2
    plain, wanted = trained.ema.x0(x, t), given(trained.ema, labels).x0(x, t)
    assert torch.equal(Guided(trained.ema, labels, 1.0).x0(x, t), wanted)
    assert torch.allclose(Guided(trained.ema, labels, 0.0).x0(x, t), plain)
    assert torch.allclose(Guided(trained.ema, labels, 3.0).x0(x, t), plain + 3 * (wanted - plain))
    assert not torch.allclose(plain, wanted, atol=0.05)


def test_labels_make_the_heldout_loss_of_labelled_data_smaller(trained, two_classes, process):
    from difficulty.ranking import RankingTask
    from difficulty.tasks import make_tasks

    tasks = [RankingTask.of(task, process) for task in make_tasks(process, 4)]
    heldout = HeldOut(two_classes, process, tasks, conditioning=Classes(two_classes))
    told = heldout.evaluate(trained.ema).nats
    heldout.condition = None
    assert told < heldout.evaluate(trained.ema).nats


def test_labels_that_are_always_dropped_are_never_learned(two_classes, process):
    plan = TrainPlan(**(vars(PLAN) | {"condition_dropout": 1.0, "steps": 20}))
    trainer = Trainer(two_classes, process, plan)
    for _ in range(20):
        trainer.step()
    weight = trainer.denoiser.network.network.embedding.part.label.weight
    assert (weight[:2] == 0).all()
    assert (weight[2] != 0).any()


def test_labels_are_dropped_as_often_as_asked(two_classes, process):
    trainer = Trainer(two_classes, process, TrainPlan(**(vars(PLAN) | {"condition_dropout": 0.3, "batch": 400})))
    rows = torch.arange(400)
    dropped = torch.cat([trainer._condition(rows, step, slice(400)) == 2 for step in range(50)]).float().mean()
    assert float(dropped) == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 20000))


def test_conditional_run_is_resumed_and_restored_with_its_labels(two_classes, process, tmp_path):
    plan = TrainPlan(**(vars(PLAN) | {"steps": 30}))
    cadence = Cadence(evaluate=10, checkpoint=10, sample=0)

    def stop(trainer, loss):
        if trainer.done == 17:
            raise KeyboardInterrupt

    whole = train(two_classes, process, plan, tmp_path / "whole", cadence=cadence)
    with pytest.raises(KeyboardInterrupt):
        train(two_classes, process, plan, tmp_path / "cut", cadence=cadence, watch=stop)
    train(two_classes, process, plan, tmp_path / "cut", cadence=cadence)
    denoiser, config = restore(tmp_path / "cut")
    assert config["condition"]["network"] == {"classes": 2}
    relabelled = replace(two_classes, labels=1 - two_classes.labels)
    with pytest.raises(InputError, match="a run with other settings"):
        train(relabelled, process, plan, tmp_path / "cut", cadence=cadence)
    labels = torch.arange(6) % 2
    first = draw_samples(denoiser, 6, (2,), seed=0, condition=labels, guidance=2.0)
    assert torch.equal(first, draw_samples(whole.ema, 6, (2,), seed=0, condition=labels, guidance=2.0))


def test_conditioning_without_labels_is_refused(gaussian, process, two_classes):
    with pytest.raises(InputError, match="no labels"):
        Trainer(gaussian, process, PLAN)
    plain = Trainer(two_classes, process, TrainPlan(network="mlp:width=8"))
    for guidance in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"guidance must be a finite number, got {guidance}"):
            draw_samples(plain.ema, 4, (2,), seed=0, guidance=guidance)
    with pytest.raises(InputError, match="without a condition"):
        draw_samples(plain.ema, 4, (2,), seed=0, condition=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match="no labels"):
        ClassJudge(gaussian)


@pytest.mark.parametrize(
    ("own", "heldout", "said"),
    [
        ([-1, 0], [0, -1], "2 classes labelled -1 to 0 instead of 0 to 1; renumber them"),
        ([0, 1], [1, 2], "class 2 of data set .* has held-out samples alone"),
        ([0, 10**9], [0, 10**9], "2 classes labelled 0 to 1000000000 instead of 0 to 1; renumber them"),
        ([1, 2], [1, 2], "2 classes labelled 1 to 2 instead of 0 to 1; renumber them"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(
    own, heldout, said, two_classes, process, tmp_path
):
    data = replace(
        two_classes,
        labels=torch.tensor(own)[torch.arange(len(two_classes.train)) % 2],
        heldout_labels=torch.tensor(heldout)[torch.arange(len(two_classes.heldout)) % 2],
    )
    with pytest.raises(InputError, match=said):
        train(data, process, PLAN, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=said):
        ClassJudge(data)


def test_labels_that_are_no_whole_numbers_are_refused():
    points = np.random.default_rng(0).normal(size=(40, 2))
    with pytest.raises(InputError, match="labels of type float64; they must be whole numbers"):
        split_samples("halves", points, labels=np.full(40, 0.5))
