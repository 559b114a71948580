"""The cache gives what was computed from the same facts, or computes it."""

import pytest
import torch

from difficulty.cache import cache_folder, cached_tensors

FACTS = {"model": "a", "data": [1, 2]}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DENOISING_DIFFICULTY_CACHE", str(tmp_path / "cache"))


class Counted:
    """A computation that counts how often it is made, and what was said."""

    def __init__(self):
        self.times, self.told = 0, []

    def __call__(self):
        self.times += 1
        return {"x": torch.arange(6.0).reshape(2, 3), "mask": torch.tensor([True, False]), "none": torch.zeros(0, 4)}

    def get(self, facts=FACTS):
        return cached_tensors("things", facts, self, self.told.append)


def test_computed_once_and_the_same_ever_after():
    counted = Counted()
    first, second = counted.get(), counted.get()
    assert counted.times == 1
    assert not counted.told
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


def test_other_facts_are_another_file():
    counted = Counted()
    counted.get()
    counted.get(FACTS | {"model": "b"})
    assert counted.times == 2
    assert len(list(cache_folder().iterdir())) == 2


def _cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the values, which safetensors does not check
    path.write_bytes(content)


def _of_other_facts(path):
    Counted().get(FACTS | {"model": "b"})
    other = next(file for file in cache_folder().iterdir() if file != path)
    other.rename(path)


def _foreign(path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2, 3)}, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [(_cut, "cannot be read"), (_flip, "damaged"), (_of_other_facts, "other data"), (_foreign, "no file of this")],
)
def test_a_file_that_is_not_the_answer_is_said_and_computed_again(harm, message):
    counted = Counted()
    good = counted.get()
    harm(next(cache_folder().iterdir()))
    again = counted.get()
    assert counted.times == 2
    assert len(counted.told) == 1
    assert message in counted.told[0]
    assert torch.equal(good["x"], again["x"])
    counted.get()
    assert counted.times == 2
