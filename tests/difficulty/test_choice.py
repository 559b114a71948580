"""The choice among families, given the held-out likelihoods that it rests on."""

from types import SimpleNamespace

import numpy as np
import pytest

from difficulty.relative_entropy.choice import RICHER_WEIGHT, Choice, choose
from difficulty.relative_entropy.estimate import Settings
from difficulty.relative_entropy.families import Candidate

GAUSSIAN, PRODUCT, MIXTURE = Candidate("gaussian"), Candidate("product", 2), Candidate("mixture", 4, 3.0)
RIVAL = 0.005  # plausibility of what is out of favour, but not out of the question
NEVER = 1e-9


def chosen(**plausibility: list[float]) -> Choice:
    """The choice at levels of more and more noise from the plausibility of each family there."""
    families = {c.family: c for c in (GAUSSIAN, PRODUCT, MIXTURE)}
    given = {families[name]: 2 * np.log(values)[:, None] for name, values in plausibility.items()}
    levels = len(next(iter(given.values())))
    tests = SimpleNamespace(
        folds=[0, 1],
        likelihood=lambda candidate, *_: given[candidate] / 2,
        sample=SimpleNamespace(rank=3),
    )
    return choose(list(given), tests, np.arange(levels, dtype=float), Settings(100, 8, 0, lambda *_: None))


def test_the_simplest_plausible_family_is_chosen_and_a_richer_one_doubts_it():
    choice = chosen(gaussian=[0.9], product=[1.0])
    assert choice.names == [GAUSSIAN, PRODUCT]
    assert choice.weight.tolist() == [[1.0], [RICHER_WEIGHT]]
    assert choice.plausibility[:, 0] == pytest.approx([0.9, 1.0])


def test_as_few_families_as_serve_all_levels():
    choice = chosen(gaussian=[NEVER, 0.9], product=[1.0, 1.0])
    assert [choice.names[i] for i in choice.weight.argmax(0)] == [PRODUCT, PRODUCT]


@pytest.mark.parametrize(("plausible", "weight"), [(RIVAL, RICHER_WEIGHT), (NEVER, 0.0)])
def test_what_less_noise_chooses_is_a_rival_unless_more_refutes_it(plausible, weight):
    choice = chosen(product=[1.0, plausible], mixture=[NEVER, 1.0])
    assert [choice.names[i] for i in choice.weight.argmax(0)] == [PRODUCT, MIXTURE]
    assert choice.weight[0, 1] == pytest.approx(weight)


def test_what_less_noise_refutes_is_no_rival():
    choice = chosen(product=[1.0, 1.0], mixture=[NEVER, 0.9])
    assert choice.weight[1].tolist() == [0.0, 0.0]
