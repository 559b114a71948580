"""Every weight against the formula of its paper, stated in the paper's own parameterisation."""

import numpy as np
import pytest

from difficulty.errors import InputError
from difficulty.process import PROCESSES, get_process
from training.weights import WEIGHTS, loss_weights

VP = get_process("vp-linear")
SNR = np.exp(VP.log_snr(np.arange(1, 1001)))
EDM = get_process("edm")
SIGMA = EDM.sigma[1:]


@pytest.mark.parametrize(("prediction", "divisor"), [("x0", 1.0), ("eps", SNR), ("v", SNR + 1)], ids=["x0", "eps", "v"])
def test_min_snr_is_min_of_snr_and_gamma_over_the_factor_of_each_prediction(prediction, divisor):
    # Hang et al. 2023, section 3.4: x0 min(SNR, g); eps min(SNR, g)/SNR; v min(SNR, g)/(SNR + 1)
    assert np.allclose(loss_weights("min-snr", VP, prediction)[1:], np.minimum(SNR, 5) / divisor, rtol=1e-10)


def test_p2_on_eps_is_one_over_k_plus_snr_to_the_gamma():
    # Choi et al. 2022, eq. 8 with the weight of L_simple, which is 1 on eps
    assert np.allclose(loss_weights("p2:k=1,gamma=0.5", VP, "eps")[1:], (1 + SNR) ** -0.5, rtol=1e-10)


def test_edm_weight_is_that_of_its_table_on_x0_and_one_on_the_raw_network():
    expected = (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2  # Karras et al. 2022, table 1: lambda(sigma)
    assert np.allclose(loss_weights("edm", EDM, "x0")[1:], expected, rtol=1e-10)
    # lambda is chosen as 1/c_out^2, so that the weight on F is 1 everywhere
    assert np.allclose(loss_weights("edm", EDM, "edm")[1:], 1, rtol=1e-9)
    for prediction in ("edm:sigma_data=1", "edm:sigma_data=0.3"):
        assert np.allclose(loss_weights("edm", EDM, prediction)[1:], 1, rtol=1e-9)
    # An option of its own is kept.
    other = (SIGMA**2 + 4) / (SIGMA * 2) ** 2
    assert np.allclose(loss_weights("edm:sd=2", EDM, "x0")[1:], other, rtol=1e-10)


def test_soft_min_snr_joins_the_two_branches_of_min_snr():
    weight = loss_weights("soft-min-snr:gamma=5", VP, "x0")[1:]
    assert np.allclose(weight, 1 / (1 / SNR + 1 / 5), rtol=1e-10)
    assert (weight <= np.minimum(SNR, 5)).all()


def test_truncated_snr_never_falls_below_one_on_x0():
    assert np.allclose(loss_weights("truncated-snr", VP, "x0")[1:], np.maximum(SNR, 1), rtol=1e-10)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_weight_named_after_a_prediction_is_one_on_that_prediction(prediction):
    assert np.allclose(loss_weights(prediction, VP, prediction)[1:], 1, rtol=1e-9)


def test_constant_weight_is_one_on_whatever_the_network_predicts():
    assert (loss_weights("constant", VP, "v")[1:] == 1).all()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ["min-snr", "soft-min-snr", "p2", "eps"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity"])
def test_bounded_weights_are_finite_where_the_signal_vanishes(name, process, prediction):
    weight = loss_weights(name, get_process(process), prediction)
    assert np.isfinite(weight).all()
    assert (weight[1:-1] > 0).all()


def test_min_snr_on_eps_tends_to_one_at_zero_snr():
    assert loss_weights("min-snr", get_process("flow-matching"), "eps")[-1] == pytest.approx(1)


def test_weight_that_is_infinite_at_zero_snr_is_refused_with_its_timestep():
    with pytest.raises(InputError, match="t = 1000"):
        loss_weights("truncated-snr", get_process("flow-matching"), "eps")


@pytest.mark.parametrize("spec", ["min-snar", "min-snr:g=5", "constant:a=1"])
def test_unknown_weights_and_options_are_refused(spec):
    with pytest.raises(InputError):
        loss_weights(spec, VP, "eps")


@pytest.mark.parametrize(
    "spec",
    ["edm:sd=0", "min-snr:gamma=0", "soft-min-snr:gamma=0", "min-snr:gamma=-1", "p2:k=nan", "p2:gamma=inf", "edm:sd=a"],
)
def test_options_that_are_no_positive_numbers_are_refused(spec):
    with pytest.raises(InputError, match="must be a positive number, got"):
        loss_weights(spec, VP, "eps")


def test_every_weight_is_stated_for_log_snr_alone():
    # The same SNR on another process has the same weight on x0.
    log_snr = VP.log_snr(500)
    other = get_process("ve")
    t = float(other.t_at(log_snr))
    for name, formula in WEIGHTS.items():
        at_t = loss_weights(name, other, "x0")[int(t)]
        assert at_t == pytest.approx(float(formula(np.exp(other.log_snr(int(t))))), rel=1e-9)
