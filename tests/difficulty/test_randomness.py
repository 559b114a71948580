"""Streams are named by their counters, however they are read."""

import threading

import numpy as np
import pytest
import torch

from difficulty.randomness import integers, normal, stream, uniform


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1, 2**32, 2**40 + 3])
@pytest.mark.parametrize("step", [0, 1, 1023, 1024, 100_003, 2**32 - 1, 2**32 + 5])
def test_draws_are_those_of_numpys_own_generator_of_the_same_counters(seed, step):
    for name in (1, 7):
        counters = (seed, name, step, 0)
        assert np.array_equal(uniform((5,), *counters), stream(*counters).random(5))
        assert np.array_equal(normal((2, 3), *counters), stream(*counters).standard_normal((2, 3), dtype=np.float32))
        assert np.array_equal(integers(359, 7, *counters), stream(*counters).integers(0, 359, 7))
    assert np.array_equal(uniform((5,), seed, step), stream(seed, step).random(5))


def test_a_stream_begins_anew_however_much_of_another_was_read():
    first = integers(10, 3, 0, 1, 5, 0)  # three draws of 32 bits leave half a word behind
    normal((1001,), 0, 2, 5, 0)
    assert torch.equal(integers(10, 3, 0, 1, 5, 0), first)


def test_threads_do_not_disturb_each_others_streams():
    expected = {step: float(uniform((2000,), 3, 1, step, 0).sum()) for step in range(40)}
    wrong = []

    def work():
        for step, total in expected.items():
            if float(uniform((2000,), 3, 1, step, 0).sum()) != total:
                wrong.append(step)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
