"""Forward processes against their defining formulas."""

import mpmath
import numpy as np
import pytest

from difficulty.errors import InputError
from difficulty.process import PROCESSES, from_arrays, get_process

ALL = list(PROCESSES)


@pytest.mark.parametrize("name", ALL)
def test_log_snr_falls_with_t(name):
    process = get_process(name)
    finite = process.log_snr(np.arange(1, process.T))
    assert np.isfinite(finite).all()
    assert (np.diff(finite) < 0).all()
    assert process.log_snr(process.T) < finite[-1]


@pytest.mark.parametrize("name", ALL)
def test_log_snr_between_grid_points_lies_between_them(name):
    process = get_process(name)
    t = np.arange(1, process.T - 1)
    middle = process.log_snr(t + 0.5)
    assert (middle < process.log_snr(t)).all()
    assert (middle > process.log_snr(t + 1)).all()


@pytest.mark.parametrize("name", ALL)
def test_t_at_inverts_log_snr_on_and_off_the_grid(name):
    process = get_process(name)
    t = np.array([1, 1.5, 17, 250.25, 500, 731.9, process.T - 1])
    np.testing.assert_allclose(process.t_at(process.log_snr(t)), t, rtol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_clean_data_stand_at_t_zero(name):
    alpha, sigma = get_process(name).alpha_sigma(0)
    assert (alpha, sigma) == (1, 0)


@pytest.mark.parametrize("name", ["vp-linear", "vp-cosine"])
def test_variance_preserving_means_alpha_squared_plus_sigma_squared_is_one(name):
    process = get_process(name)
    np.testing.assert_allclose(process.alpha**2 + process.sigma**2, 1, rtol=1e-14)


def test_vp_linear_sigma_keeps_its_digits_at_low_t():
    process = get_process("vp-linear")
    with mpmath.workdps(50):
        product = mpmath.mpf(1)
        for i in range(20):
            beta = mpmath.mpf(np.linspace(1e-4, 0.02, 1000)[i])
            product *= 1 - beta
            exact = mpmath.sqrt(1 - product)
            assert abs(process.sigma[i + 1] / exact - 1) < 1e-14


def test_edm_and_ve_run_from_0002_to_80():
    for name in ("edm", "ve"):
        process = get_process(name)
        np.testing.assert_allclose(process.sigma[[1, -1]], [0.002, 80.0], rtol=1e-12)
        assert (process.alpha == 1).all()


def test_edm_is_straight_in_sigma_to_one_over_rho():
    root = get_process("edm").sigma[1:] ** (1 / 7)
    np.testing.assert_allclose(np.diff(root), np.diff(root).mean(), rtol=1e-9)


def test_flow_matching_is_a_straight_line_that_ends_in_noise():
    process = get_process("flow-matching")
    np.testing.assert_allclose(process.alpha + process.sigma, 1, rtol=1e-15)
    assert process.alpha[-1] == 0
    assert process.log_snr(process.T) == -np.inf


@pytest.mark.parametrize("name", ALL)
def test_a_process_given_by_its_arrays_is_the_same_process(name):
    process = get_process(name)
    for first in (0, 1):
        again = from_arrays(process.alpha[first:], process.sigma[first:], "mine")
        assert again.fingerprint["sha256"] == process.fingerprint["sha256"]
    again.check_fingerprint(process.fingerprint, "its file")


def test_interpolated_arrays_stay_close_to_the_closed_form():
    edm = get_process("edm:T=200")
    again = from_arrays(edm.alpha, edm.sigma)
    t = np.linspace(1, 200, 731)
    np.testing.assert_allclose(again.alpha_sigma(t)[1], edm.alpha_sigma(t)[1], rtol=2e-3)


@pytest.mark.parametrize(
    ("other", "message"),
    [("vp-linear:T=500", "T = 500"), ("vp-cosine", "noise levels differ"), ("vp-linear:beta_last=0.021", "differ")],
)
def test_a_file_of_another_process_is_refused(other, message):
    with pytest.raises(InputError, match=message):
        get_process("vp-linear").check_fingerprint(get_process(other).fingerprint, "curriculum.json")


def test_a_file_that_counts_t_the_other_way_is_refused():
    fingerprint = get_process("edm").fingerprint | {"t_direction": "noise decreases with t"}
    with pytest.raises(InputError, match="noise increases with t"):
        get_process("edm").check_fingerprint(fingerprint, "curriculum.json")


@pytest.mark.parametrize("t", [-1, 0.5, 1001, np.nan])
def test_timesteps_outside_are_refused(t):
    with pytest.raises(InputError, match="lie in"):
        get_process("vp-linear").alpha_sigma(t)


@pytest.mark.parametrize(
    ("alpha", "sigma", "message"),
    [
        ([1, 0.5, 0.6], [0.1, 0.5, 0.2], "noise must increase"),
        ([1, np.nan, 0.6], [0.1, 0.5, 0.7], "NaN"),
        ([1, 0.5], [0.1, 0.5, 0.7], "equally long"),
        ([1, -0.5, 0.1], [0.1, 0.5, 0.7], "positive"),
        ([], [], "equally long"),
    ],
)
def test_arrays_that_are_no_process_are_refused(alpha, sigma, message):
    with pytest.raises(InputError, match=message):
        from_arrays(alpha, sigma)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="vp-linear, vp-cosine, edm, ve, flow-matching"):
        get_process("linear")
    with pytest.raises(InputError, match="its options are: T, beta_first, beta_last"):
        get_process("vp-linear:steps=10")
    with pytest.raises(InputError, match="at least 2 timesteps"):
        get_process("edm:T=1")


def test_a_process_of_ones_own_is_read_from_its_file(tmp_path):
    process = get_process("vp-linear:T=40")
    np.savez(tmp_path / "mine.npz", alpha=process.alpha[1:], sigma=process.sigma[1:])
    np.savez(tmp_path / "cumulated.npz", alphas_cumprod=process.alpha[1:] ** 2)
    for name in ("mine", "cumulated"):
        found = get_process(str(tmp_path / f"{name}.npz"))
        assert found.name == name
        found.check_fingerprint(process.fingerprint, "the arrays")


def test_a_process_of_ones_own_never_bears_the_name_of_a_built_in_one(tmp_path):
    process = get_process("vp-linear:T=40")
    np.savez(tmp_path / "edm.npz", alpha=process.alpha[1:], sigma=process.sigma[1:])
    assert get_process(str(tmp_path / "edm.npz")).name == "edm.npz"


@pytest.mark.parametrize("place", ["", "scheduler"])
def test_a_process_of_ones_own_is_read_from_the_folder_of_a_scheduler(tmp_path, place):
    diffusers = pytest.importorskip("diffusers")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / place)
    np.testing.assert_allclose(get_process(tmp_path).sigma, get_process("vp-linear").sigma, rtol=1e-4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"alpha": [0.9, 0.5]}, "holds the arrays alpha; needed are alpha and sigma, or alphas_cumprod"),
        ({"alpha": [[0.9, 0.5]], "sigma": [[0.1, 0.5]]}, "one-dimensional and equally long"),
        ({"alpha": [0.9, 0.5], "sigma": [0.5]}, "one-dimensional and equally long"),
        ({"alpha": 0.9, "sigma": 0.1}, "one-dimensional and equally long"),
        ({"alphas_cumprod": [1.5, 0.5]}, "must lie in"),
        ({"alphas_cumprod": [0.5, 0.9]}, "noise must increase with t"),
        ({"alpha": ["a", "b"], "sigma": ["c", "d"]}, "cannot be read as arrays of numbers"),
        ({"alpha": np.array([None, {}])}, "cannot be read as arrays of numbers"),
    ],
)
def test_files_that_hold_no_process_cost_one_sentence(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(InputError, match=message):
        get_process(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize("content", [b"", b"no arrays", b"PK\x03\x04 truncated"])
def test_files_of_another_format_cost_one_sentence(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        get_process(str(tmp_path / "mine.npz"))


def test_places_without_a_process_cost_one_sentence(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        get_process(str(tmp_path / "absent.npz"))
    with pytest.raises(InputError, match="neither it nor its subfolder"):
        get_process(str(tmp_path))
    with pytest.raises(InputError, match="or the FOLDER of a diffusers scheduler"):
        get_process(str(tmp_path / "absent"))


def test_a_folder_does_not_hide_a_process_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "edm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert get_process("edm:T=40").T == get_process("edm").T / 25
