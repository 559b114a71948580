"""Steps side by side change no result, and leave the libraries as they were."""

import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

from difficulty.datasets import split_samples
from difficulty.relative_entropy import kl
from difficulty.threads import MOST_THREADS, one_thread, together


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_calls_run_side_by_side_and_come_back_in_order():
    meeting = threading.Barrier(2, timeout=30)

    def call(value):
        meeting.wait()
        return value, torch.get_num_threads()

    with one_thread():
        assert together([lambda: call("a"), lambda: call("b")], 2) == [("a", 1), ("b", 1)]
    assert together([lambda: 3, lambda: 4], 1) == [3, 4]


def test_an_exception_ends_the_calls_that_have_not_begun():
    begun = []

    def call(number):
        begun.append(number)
        time.sleep(0.05)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        together([lambda number=number: call(number) for number in range(100)], 2)
    assert len(begun) < 100


def test_threads_are_few_and_put_back(two_threads):
    with one_thread() as threads:
        assert (threads, torch.get_num_threads()) == (2, 1)
    assert torch.get_num_threads() == 2
    running, most, lock = 0, 0, threading.Lock()

    def call():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    with one_thread():
        together([call] * 3 * MOST_THREADS, MOST_THREADS + 1)
    assert most == MOST_THREADS


def test_relative_entropy_is_the_same_for_any_number_of_threads(two_threads):
    rows = np.random.default_rng(0).standard_normal((400, 3)) ** 3
    data = split_samples("rows", rows)
    side_by_side = kl(data, "vp-linear", pairs=[20, 300], samples=500, bootstrap=4)
    torch.set_num_threads(1)
    pd.testing.assert_frame_equal(side_by_side, kl(data, "vp-linear", pairs=[20, 300], samples=500, bootstrap=4))
