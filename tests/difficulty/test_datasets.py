"""Data sets by name, file and folder, and the sentences for those that cannot be used."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from difficulty.datasets import DATASETS, load_dataset
from difficulty.errors import InputError

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((50, 3)).astype(np.float32)


@pytest.mark.parametrize("name", DATASETS)
def test_built_in_data_are_finite_float32_with_a_heldout_part(name):
    data = load_dataset(name)
    for part in (data.train, data.heldout):
        assert part.dtype == torch.float32
        assert torch.isfinite(part).all()
        assert tuple(part.shape[1:]) == data.shape
    assert len(data.heldout) >= 0.19 * len(data.train)
    assert data.law is None or data.law.dim == data.dim


@pytest.mark.parametrize("name", ["digits", "photo-patches-8", "photo-patches-16", "photo-patches-32"])
def test_built_in_images_fill_minus_one_to_one(name):
    data = load_dataset(name)
    assert data.train.min() == -1
    assert data.train.max() == 1


def test_the_split_is_the_same_every_time_and_disjoint():
    first, second = load_dataset("digits"), load_dataset("digits")
    assert first.fingerprint == second.fingerprint
    assert len(first.train) + len(first.heldout) == 1797
    assert first.labels is not None
    assert len(first.labels) == len(first.train)


def test_shuffled_rows_give_the_same_split(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", RNG.permutation(ROWS))
    a, b = load_dataset(tmp_path / "a.npy"), load_dataset(tmp_path / "b.npy")
    torch.testing.assert_close(a.train, b.train, rtol=0, atol=0)
    torch.testing.assert_close(a.heldout, b.heldout, rtol=0, atol=0)


def test_photo_patches_hold_out_pixels_that_training_never_saw():
    data = load_dataset("photo-patches-16:n=200")
    # Flattened 4x4 corners of held-out patches do not occur in any train patch of the same alignment.
    corners = {patch[:, :4, :4].numpy().tobytes() for patch in data.train}
    assert not corners & {patch[:, :4, :4].numpy().tobytes() for patch in data.heldout}


def test_samples_of_an_exact_law_have_its_moments():
    data = load_dataset("gaussian:dim=5,var=0.25,n=20000")
    assert data.law is not None
    assert abs(float(data.train.square().sum(1).mean()) / data.law.second_moment - 1) < 0.03


def test_arrays_are_taken_as_they_are_from_every_format(tmp_path):
    wanted = np.sort((100 * ROWS).ravel())
    np.save(tmp_path / "a.npy", 100 * ROWS)
    np.savez(tmp_path / "a.npz", data=100 * ROWS, labels=np.arange(50))
    torch.save({"x": torch.tensor(100 * ROWS)}, tmp_path / "a.pt")
    save_file({"images": 100 * ROWS}, tmp_path / "a.safetensors")
    for suffix in ("npy", "npz", "pt", "safetensors"):
        data = load_dataset(tmp_path / f"a.{suffix}")
        np.testing.assert_array_equal(np.sort(torch.cat([data.train, data.heldout]).numpy().ravel()), wanted)
    assert load_dataset(tmp_path / "a.npz").labels is not None


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.int32, bool])
def test_any_real_number_type_is_read(tmp_path, dtype):
    np.save(tmp_path / "a.npy", (ROWS > 0).astype(dtype))
    assert load_dataset(tmp_path / "a.npy").train.dtype == torch.float32


def image_folder(path, sizes=((6, 6),) * 30, mode="RGB"):
    for i, size in enumerate(sizes):
        (path / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode).save(
            path / f"class{i % 2}" / f"{i:02d}.png"
        )
    return path


def test_images_of_sixteen_bits_are_scaled_not_clipped(tmp_path):
    for i in range(30):
        Image.fromarray(np.full((2, 2), i * 65535 // 29, dtype=np.uint16)).save(tmp_path / f"{i:02d}.png")
    data = load_dataset(tmp_path)
    levels = torch.cat([data.train, data.heldout]).flatten(1)[:, 0].sort().values
    torch.testing.assert_close(levels, torch.linspace(-1, 1, 30), rtol=0, atol=1e-4)


def test_a_tensor_that_was_being_trained_is_read(tmp_path):
    torch.save(torch.randn(40, 3, requires_grad=True), tmp_path / "d.pt")
    assert load_dataset(tmp_path / "d.pt").shape == (3,)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_an_image_folder_gives_scaled_images_labels_and_captions(tmp_path, mode, channels):
    folder = image_folder(tmp_path, mode=mode)
    lines = [{"file_name": f"class{i % 2}/{i:02d}.png", "text": f"picture {i}"} for i in range(30)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_dataset(folder)
    assert data.shape == (channels, 6, 6)
    assert -1 <= data.train.min() < -0.8 < 0.8 < data.train.max() <= 1
    assert data.labels is not None
    assert set(data.labels.tolist()) == {0, 1}
    assert data.captions is not None
    # Captions and labels travel with their image through the split.
    assert all(int(c.split()[1]) % 2 == label for c, label in zip(data.captions, data.labels.tolist(), strict=True))


def test_a_caption_may_hold_any_character_and_must_be_text(tmp_path):
    folder = image_folder(tmp_path)
    lines = [{"file_name": f"class{i % 2}/{i:02d}.png", "text": f"a\u2028b\u0085 {i}"} for i in range(30)]
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    data = load_dataset(folder)
    assert {*data.captions, *data.heldout_captions} == {line["text"] for line in lines}
    (folder / "metadata.jsonl").write_text('{"file_name": "class0/00.png", "text": null}')
    with pytest.raises(InputError, match="line 1 is not an object with file_name and text"):
        load_dataset(folder)


@pytest.mark.parametrize(("mode", "red"), [("RGBA", (255, 0, 0, 0)), ("LA", (10, 0))])
def test_pixels_that_do_not_show_are_white(tmp_path, mode, red):
    for i in range(20):
        image = Image.new(mode, (4, 4), red)
        seen = (0, 0, 0, 255) if mode == "RGBA" else (0, 255)
        image.putpixel((0, 0), seen)
        image.save(tmp_path / f"{i:02d}.png")
    data = load_dataset(tmp_path)
    assert data.shape == (3 if mode == "RGBA" else 1, 4, 4)
    assert (data.train[:, :, 0, 0] == -1).all()
    assert (data.train[:, :, 1:] == 1).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.where(ROWS > 2, np.nan, ROWS), "NaN"),
        (np.full((50, 3), np.inf), "infinite"),
        (ROWS[:10], "at least 20"),
        (np.zeros((50, 3, 4)), "vectors .* or images"),
        (np.zeros((50, 0)), "size zero"),
        (np.array(["a"] * 50), "array of numbers"),
        (ROWS.astype(complex), "complex"),
        (np.full((50, 2), 1e60), "overflow"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message):
        load_dataset(tmp_path / "a.npy")


def test_a_negative_number_of_samples_in_memory_is_refused():
    with pytest.raises(InputError, match="kept in memory must not be negative, got -3"):
        load_dataset("digits", resident=-3)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    np.save(tmp_path / "whole.npy", ROWS)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:200])
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}] * 30, dtype=object))
    (tmp_path / "text.txt").write_text("hello")
    np.savez(tmp_path / "two.npz", first=ROWS, second=ROWS)
    for name, message in [
        ("cut.npy", "truncated"),
        ("pickled.npy", "cannot read"),
        ("text.txt", "known are .npy"),
        ("absent.npy", "does not exist"),
        ("two.npz", "name the samples 'data'"),
    ]:
        with pytest.raises(InputError, match=message):
            load_dataset(tmp_path / name)


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        load_dataset(tmp_path / "empty")
    with pytest.raises(InputError, match=r"differ in size: .*00\.png has shape \(3, 6, 6\), .*29\.png has \(3, 6, 7\)"):
        load_dataset(image_folder(tmp_path / "sizes", [(6, 6)] * 29 + [(6, 7)]))
    broken = image_folder(tmp_path / "broken")
    (broken / "class0" / "00.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_dataset(broken)
    uncaptioned = image_folder(tmp_path / "captions")
    (uncaptioned / "metadata.jsonl").write_text('{"file_name": "class0/00.png", "text": "a"}')
    with pytest.raises(InputError, match=r"no caption for class0/02\.png"):
        load_dataset(uncaptioned)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "known are digits, digits-mixture"),
        ("gaussian:size=3", "its options are: dim, var, n, seed"),
        ("gaussian:dim", "not of the form key=value"),
        ("gaussian:dim=0", "dim >= 1"),
        ("grid-2d:n=5", "n >= 20"),
    ],
)
def test_unknown_names_and_options_say_what_is_known(name, message):
    with pytest.raises(InputError, match=message):
        load_dataset(name)
