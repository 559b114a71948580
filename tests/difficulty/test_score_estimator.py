"""The score estimator: with a denoiser that knows the posterior, with one trained here, and one that it refuses."""

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from difficulty.datasets import Dataset, split_samples
from difficulty.errors import InputError
from difficulty.laws import GaussianMixture, gaussian
from difficulty.models import TrainedModel
from difficulty.process import get_process
from difficulty.relative_entropy import kl, score_training
from difficulty.relative_entropy.score_field import ModelScore, evaluate
from difficulty.wiener import Wiener

TIMES = [8, 24, 65, 150, 320, 550, 651, 950]


def mixture(dim=16, modes=4, seed=2):
    rng = np.random.default_rng(seed)
    axes = [ortho_group.rvs(dim, random_state=100 * seed + k) for k in range(modes)]
    covariances = np.stack([(a * np.exp(rng.uniform(-2.3, 0, dim))) @ a.T for a in axes])
    return GaussianMixture(rng.uniform(0.5, 1.5, modes), rng.standard_normal((modes, dim)), covariances)


def rows_of(law, n, seed=0):
    return law.sample(n, torch.Generator().manual_seed(seed)).float()


def knowing(law, process):
    """A model that returns E[eps | x_t]."""

    def eps(x, t):
        step = int(t[0])
        return law.posterior_eps(x.double(), float(process.alpha[step]), float(process.sigma[step]))

    return TrainedModel("exact posterior", process, eps)


@pytest.fixture(scope="module")
def known():
    law, process = mixture(), get_process("vp-linear")
    data = Dataset("modes", rows_of(law, 2000), rows_of(law, 1500, 1))
    return law, process, data, Dataset("exact", data.train, data.heldout, law=law)


def test_what_a_step_adds_beyond_its_second_order_is_no_fault_of_the_denoiser():
    # Thinner than the noise along two axes: 1/2 E[f^2] is 14 and 7 % more than the KL.
    law = GaussianMixture([1.0], np.zeros((1, 4)), np.diag([1.0, 1.0, 1e-7, 1e-7])[None])
    process = get_process("vp-linear")
    data = Dataset("thin", rows_of(law, 2000), rows_of(law, 1500, 1))
    found = kl(data, process, estimator="score", model=knowing(law, process), pairs=[4, 8])
    exact = kl(Dataset("exact", data.train, data.heldout, law=law), process, pairs=[4, 8])
    assert found.valid.all()
    np.testing.assert_allclose(found.kl, exact.kl, rtol=0.02)
    assert (found.ci_high / found.ci_low < 1.25).all()


def test_exact_posterior_gives_the_kl_and_its_reverse_at_single_steps(known):
    law, process, data, exact = known
    found = kl(data, process, estimator="score", model=knowing(law, process), pairs=TIMES)
    truth = kl(exact, process, pairs=TIMES, samples=20_000)
    assert np.abs(found.kl / truth.kl - 1).max() < 0.08
    assert np.abs(found.kl_reverse / truth.kl_reverse - 1).max() < 0.08
    # At less noise the errors of so many rows are near what a valid pair may have, on one side of it or the other.
    assert found.valid[found.t.between(320, 651)].all()
    assert ((found.ci_low <= truth.kl) & (truth.kl <= found.ci_high)).mean() > 0.7


def test_exact_posterior_gives_the_kl_of_coarse_intervals():
    law, process = mixture(3, seed=5), get_process("vp-linear")
    data = Dataset("modes", rows_of(law, 2000), rows_of(law, 1500, 1))
    found = kl(data, process, estimator="score", model=knowing(law, process), tasks=5)
    truth = kl(Dataset("exact", data.train, data.heldout, law=law), process, tasks=5, samples=40_000)
    assert np.abs(found.kl / truth.kl - 1).max() < 0.06


def test_two_probes_do_not_bias_the_kl_at_high_noise():
    # 24 dimensions: more than are differentiated one by one. The square of one probe would be off by orders of
    # magnitude.
    law, process = gaussian(24, 0.3, 0.4), get_process("vp-linear")
    data = Dataset("gauss", rows_of(law, 2000), rows_of(law, 800, 1))
    pairs = [150, 550, 950]
    found = kl(data, process, estimator="score", model=knowing(law, process), pairs=pairs)
    truth = kl(Dataset("exact", data.train, data.heldout, law=law), process, pairs=pairs)
    assert np.abs(found.kl / truth.kl - 1).max() < 0.25


def test_gain_of_a_useless_correction_is_zero_and_of_the_posterior_one():
    law, process = mixture(4), get_process("vp-linear")
    rows = rows_of(law, 2000).double()
    wiener = Wiener(rows.numpy(), np.ones(len(rows)))
    noise = torch.randn(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    number = torch.arange(len(rows))

    def gain(model, t):
        tau = float(process.tau(t))
        source = ModelScore(model, process, (4,))
        return evaluate(source, wiener, rows + np.exp(tau) * noise, tau, 0).gain(number)

    def shifted(x, t):
        return knowing(law, process).eps(x, t) + 0.2 * torch.sin(3 * x)

    assert gain(knowing(law, process), 100) > 0.8
    assert gain(TrainedModel("shifted", process, shifted), 950) < 0.05


def test_a_network_trained_here_is_right_where_it_calls_itself_valid(monkeypatch):
    monkeypatch.setattr(score_training, "ITERATIONS", 900)
    monkeypatch.setattr("difficulty.relative_entropy.score_estimator.ITERATIONS", 900)
    law = GaussianMixture([1, 2], [[-1.0, 0.0], [1.0, 0.5]], [0.1 * np.eye(2)] * 2)
    rows, pairs = rows_of(law, 2000).numpy(), [65, 150, 320, 550]
    seen = []
    found = kl(
        split_samples("two", rows), "vp-linear", estimator="score", pairs=pairs,
        progress=lambda done, total: seen.append(done / total),
    )  # fmt: skip
    exact = Dataset("exact", torch.zeros(2, 2), torch.zeros(2, 2), law=law)
    truth = kl(exact, "vp-linear", pairs=pairs, samples=20_000)
    assert found.valid.sum() >= 2
    assert np.abs(found.kl / truth.kl - 1)[found.valid].max() < 0.3
    assert (found.estimator == "score").all()
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_a_denoiser_that_saw_other_data_is_not_valid(known):
    _, process, data, _ = known
    found = kl(data, process, estimator="score", model=knowing(gaussian(16, 0.01), process), pairs=[65, 150])
    truth = kl(known[3], process, pairs=[65, 150])
    assert (~found.valid | (np.abs(found.kl / truth.kl - 1) < 0.3)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "else"}, "whose noise levels differ|was made for"),
        ({"model": "constant"}, "cannot be differentiated"),
        ({"model": "known", "estimator": "auto"}, "serves estimator 'score' only"),
        ({"model": "/nowhere"}, "is no model"),
    ],
)
def test_a_model_that_does_not_fit_is_named_in_one_sentence(known, options, message):
    law, process, data, _ = known
    models = {
        "else": knowing(law, get_process("edm")),
        "constant": TrainedModel("constant", process, lambda x, t: torch.zeros_like(x).detach()),
        "known": knowing(law, process),
    }
    options = {"estimator": "score"} | options | {"model": models.get(options["model"], options["model"])}
    with pytest.raises(InputError, match=message):
        kl(data, process, pairs=[100], **options)


def test_too_few_samples_to_train_on_are_refused():
    with pytest.raises(InputError, match="distinct samples"):
        kl(split_samples("few", np.random.default_rng(0).standard_normal((25, 2))), "vp-linear", estimator="score")
