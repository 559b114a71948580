import numpy as np
import pytest
import torch

from difficulty.errors import InputError
from training.metrics import METRICS, SampleJudge

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2000, 6))


def test_the_name_of_a_metric_says_the_distance_and_the_features():
    assert set(METRICS) == {"fd-pixels", "fd-pca", "sw-pixels", "sw-pca"}
    with pytest.raises(InputError):
        SampleJudge(torch.from_numpy(X), ("fid",))


def test_samples_of_the_data_are_as_far_as_two_halves_of_it():
    data = torch.from_numpy(X).float()
    judge = SampleJudge(data[:1000], METRICS)
    fresh, shifted = judge(data[1000:]), judge(data[1000:] + 1)
    floor = judge.split_half()
    for name in METRICS:
        assert fresh[name] < 3 * floor[name]
        assert shifted[name] > 5 * floor[name]


def test_pca_features_do_not_depend_on_a_rotation_of_the_data():
    rotation, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    other = RNG.normal(size=(2000, 6)) * 1.3
    plain = SampleJudge(torch.from_numpy(X), ("fd-pca",))(torch.from_numpy(other))["fd-pca"]
    turned = SampleJudge(torch.from_numpy(X @ rotation), ("fd-pca",))(torch.from_numpy(other @ rotation))["fd-pca"]
    assert plain == pytest.approx(turned, rel=1e-6)
