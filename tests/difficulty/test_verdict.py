"""What a held-out contradiction at one noise level says about the others."""

import numpy as np
import pytest

from difficulty.datasets import split_samples
from difficulty.process import get_process
from difficulty.relative_entropy import heldout_tests
from difficulty.relative_entropy.families import Candidate
from difficulty.relative_entropy.pairs import make_pairs
from difficulty.relative_entropy.sample import Sample, make_sample
from difficulty.relative_entropy.verdict import LIMITS, Findings, objections

LEVELS = [200, 300, 400]


def verdicts(sample: Sample, families, lacking=(0.0, 0.0, 0.0), columns=0.0, spread=0.01, **contradicted) -> list[str]:
    """Reasons at three levels for a fit without fault, but for the logs of the figures that are given, (3,) each.

    Args:
        sample, families: the data, and the candidate chosen at each level.
        lacking: shares of the KL that the fit lacks.
        spread: sampling error.
        columns: error of what was added for columns of few values, as a share of the KL.
        contradicted: what is added to held-out figures, whose standard error is 0.01.
    """
    log_kl = np.full(3, np.log(1e-2))
    fine = {"second_moment": np.zeros(3), "bound": log_kl, "cross": log_kl}
    figures = {name: fine[name] + contradicted.get(name, 0.0) for name in fine}
    zero, small = np.zeros(3), np.full(3, 0.01)
    tested = heldout_tests.Tested(**{name: np.stack([value, small], 1) for name, value in figures.items()})
    lacks = np.exp(log_kl)[:, None] * np.stack([np.asarray(lacking), small], 1)
    found = Findings(log_kl, zero, small, zero, zero, np.full(3, spread), zero, tested, lacks, families)
    pairs = make_pairs(get_process("vp-linear"), LEVELS)
    return objections(sample, pairs, found, np.ones(3), np.exp(log_kl), columns * np.exp(log_kl)).tolist()


@pytest.fixture
def sample() -> Sample:
    return make_sample(split_samples("rows", np.random.default_rng(0).standard_normal((2000, 2))))


def test_what_held_out_data_refute_under_more_noise_is_refuted_under_less(sample):
    one, other = Candidate("mixture", 4, 3.0), Candidate("mixture", 6, 3.0)
    assert verdicts(sample, [one, one, one]) == ["", "", ""]
    for figure, text in (("cross", "does not predict"), ("bound", "lower bound"), ("second_moment", "another spread")):
        wrong = {figure: np.array([0.0, 1.0, 0.0])}
        first, second, third = verdicts(sample, [one, one, one], **wrong)
        assert text in first
        assert text in second
        assert third == ""
        first, second, third = verdicts(sample, [other, one, one], **wrong)
        assert (first, third) == ("", "")
        assert text in second
    first, second, third = verdicts(sample, [one, one, one], lacking=(0.0, 1.0, 0.0))
    assert "moments" in first
    assert "moments" in second
    assert third == ""
    first, second, third = verdicts(sample, [other, one, one], lacking=(0.0, 1.0, 0.0))
    assert (first, third) == ("", "")
    assert "moments" in second


@pytest.mark.parametrize(("errors", "inherited"), [(2.0, False), (3.0, True)])
def test_only_a_contradiction_beyond_doubt_counts_at_less_noise(sample, errors, inherited):
    one = Candidate("mixture", 4, 3.0)
    first, second, third = verdicts(sample, [one] * 3, cross=np.array([0.0, LIMITS.cross + errors * 0.01, 0.0]))
    assert "does not predict" in second
    assert ("does not predict" in first) == inherited
    assert third == ""


@pytest.mark.parametrize(("errors", "refused"), [(2.0, False), (3.0, True)])
def test_a_fit_that_less_noise_refutes_has_no_tolerance(sample, errors, refused):
    one, other = Candidate("mixture", 4, 3.0), Candidate("mixture", 6, 3.0)
    cross = np.array([1.0, errors * 0.01, 0.0])
    first, second, third = verdicts(sample, [one, one, one], cross=cross)
    assert "does not predict" in first
    assert ("does not predict" in second) == refused
    assert third == ""
    assert verdicts(sample, [other, one, one], cross=cross)[1:] == ["", ""]
    # What the fit lacks is known by its amount, and stands in the error.
    assert verdicts(sample, [one, one, one], lacking=(1.0, 0.1, 0.0))[1:] == ["", ""]


def test_a_pair_that_passes_alone_between_two_that_do_not_is_refused(sample):
    families = [Candidate("mixture", k, 3.0) for k in (4, 5, 6)]
    both = verdicts(sample, families, cross=np.array([1.0, 0.0, 1.0]))
    assert "both refused" in both[1]
    assert verdicts(sample, families, cross=np.array([1.0, 0.0, 0.0]))[1:] == ["", ""]
    assert verdicts(sample, families, cross=np.array([0.0, 0.0, 1.0]))[:2] == ["", ""]


def test_what_is_added_for_columns_of_few_values_must_not_be_too_uncertain(sample):
    families = [Candidate("gaussian")] * 3
    assert verdicts(sample, families, columns=0.14) == [""] * 3
    assert all("few values" in reason for reason in verdicts(sample, families, columns=0.16))


def test_a_sampling_error_that_would_break_the_promise_too_often_is_refused(sample):
    families = [Candidate("mixture", 4, 3.0)] * 3
    assert verdicts(sample, families, spread=0.11) == [""] * 3
    assert all("refits to halves" in reason for reason in verdicts(sample, families, spread=0.13))
