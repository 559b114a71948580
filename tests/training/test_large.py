"""Data in shards and tables: the batches that memory would give, at any step, on any process, until files are lost."""

import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch

from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.large import DataLost
from training.conditional import conditioning
from training.run import Cadence, train
from training.sources import Resident, Streamed
from training.trainer import Trainer, TrainPlan

Image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("datasets")
webdataset = pytest.importorskip("webdataset")

N = 90
PLAN = TrainPlan(steps=30, batch=8, network="mlp:width=8,depth=2", condition="class", warmup=5)
CADENCE = Cadence(evaluate=10, checkpoint=8, sample=0)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (N, 4, 4), dtype=np.uint8), rng.integers(0, 3, N)


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory):
    """Three tar files written by webdataset itself."""
    folder = tmp_path_factory.mktemp("shards")
    with webdataset.ShardWriter(str(folder / "s-%03d.tar"), maxcount=N // 3, verbose=0) as writer:
        for i, (pixels, label) in enumerate(zip(*pictures, strict=True)):
            writer.write(
                {"__key__": f"{i:04d}", "png": Image.fromarray(pixels), "cls": int(label), "txt": f"number {i}"}
            )
    return folder


@pytest.fixture(scope="module")
def table(pictures, tmp_path_factory):
    """The same as tables of the `datasets` library, and as a folder of images."""
    folder = tmp_path_factory.mktemp("table")
    columns = {
        "image": [Image.fromarray(p) for p in pictures[0]],
        "label": pictures[1].tolist(),
        "text": [f"number {i}" for i in range(N)],
    }
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    made.save_to_disk(str(folder / "arrow"))
    (folder / "parquet").mkdir()
    made.to_parquet(str(folder / "parquet" / "train.parquet"))
    lines = []
    for i, (pixels, label) in enumerate(zip(*pictures, strict=True)):
        name = f"{label}/{i:04d}.png"
        (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "pictures" / name)
        lines.append(json.dumps({"file_name": name, "text": f"number {i}"}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def _spec(kind, shards, table):
    return {
        "wds": f"wds:{shards}/s-{{000..002}}.tar",
        "wds with a star": f"wds:{shards}/s-*.tar",
        "arrow": f"hf:{table / 'arrow'}",
        "parquet": f"hf:{table / 'parquet'}",
        "folder": str(table / "pictures"),
    }[kind]


KINDS = ("wds", "wds with a star", "arrow", "parquet", "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_comes_with_its_own_label_and_caption(kind, shards, table, pictures):
    data = load_dataset(_spec(kind, shards, table))
    assert data.large is None
    assert data.value_range == (-1.0, 1.0)
    assert (len(data.train), len(data.heldout)) == (72, 18)
    numbers = [int(caption.split()[1]) for caption in (*data.captions, *data.heldout_captions)]
    assert sorted(numbers) == list(range(N))
    expected = torch.from_numpy(pictures[0][numbers][:, None] / np.float32(127.5) - 1)
    assert torch.allclose(torch.cat([data.train, data.heldout]), expected, atol=1e-6)
    assert torch.cat([data.labels, data.heldout_labels]).tolist() == pictures[1][numbers].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_in_memory_is_the_same_data_under_the_same_fingerprint(kind, shards, table):
    spec = _spec(kind, shards, table)
    whole, part = load_dataset(spec), load_dataset(spec, resident=30)
    assert (len(part.train), len(part.large)) == (30, 72)
    assert torch.equal(part.large.read(range(72)), whole.train)
    assert torch.equal(part.trained_labels, whole.labels)
    assert part.trained_captions == whole.captions
    assert torch.equal(part.heldout, whole.heldout)
    assert part.fingerprint == load_dataset(spec, resident=30).fingerprint


def test_other_arrays_of_the_same_size_have_another_fingerprint(tmp_path):
    found = []
    for sign in (1.0, -1.0):
        with webdataset.ShardWriter(str(tmp_path / "%d.tar"), verbose=0) as writer:
            for i in range(60):
                writer.write({"__key__": str(i), "npy": np.full((1, 2, 2), i if i < 20 else sign * i, np.float32)})
        found.append(load_dataset(f"wds:{tmp_path}/0.tar", resident=5).fingerprint["large"])
    assert found[0]["sha256"] == found[1]["sha256"]
    assert found[0]["spread_sha256"] != found[1]["spread_sha256"]


def test_shards_hold_what_webdataset_itself_reads_from_them(shards):
    read = webdataset.WebDataset(str(shards / "s-{000..002}.tar"), shardshuffle=False).decode("pil")
    theirs = {sample["txt"]: np.asarray(sample["png"].convert("L")) / 127.5 - 1 for sample in read}
    data = load_dataset(f"wds:{shards}/s-*.tar")
    assert len(theirs) == N
    for caption, sample in zip(data.captions, data.train, strict=True):
        assert np.allclose(theirs[caption], sample[0], atol=1e-6)


def test_arrays_in_shards_are_taken_as_they_are_and_described_by_json(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), verbose=0) as writer:
        for i in range(20):
            writer.write({"__key__": str(i), "npy": np.full((2, 3, 3), 7.0 * i), "json": {"label": i % 4, "text": "x"}})
    data = load_dataset(f"wds:{tmp_path}/0.tar")
    assert data.shape == (2, 3, 3)
    assert data.value_range is None
    values = torch.cat([data.train, data.heldout])[:, 0, 0, 0]
    assert sorted(values.tolist()) == [7.0 * i for i in range(20)]
    assert torch.equal((values / 7).long() % 4, torch.cat([data.labels, data.heldout_labels]))


def test_empty_captions_are_captions_and_numbers_are_none(tmp_path):
    for name, text in (("empty", ""), ("number", 7)):
        with webdataset.ShardWriter(str(tmp_path / f"{name}-%d.tar"), verbose=0) as writer:
            for i in range(20):
                kind = {"json": {"text": text}} if i and name == "number" else {"txt": "" if i else "x"}
                writer.write({"__key__": str(i), "npy": np.zeros((1, 3, 3))} | kind)
    data = load_dataset(f"wds:{tmp_path}/empty-0.tar")
    assert sorted({*data.captions, *data.heldout_captions}) == ["", "x"]
    with pytest.raises(InputError, match="has a text that is none"):
        load_dataset(f"wds:{tmp_path}/number-0.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_from_memory_from_any_step_on(workers, shards, process):
    spec = f"wds:{shards}/s-*.tar"
    memory = Trainer(load_dataset(spec), process, PLAN)
    part = Trainer(load_dataset(spec, resident=30), process, PLAN)
    assert isinstance(memory.source, Resident)
    assert isinstance(part.source, Streamed)
    part.source.workers = workers
    for step in (0, 1, 2, 3, 17, 18, 4, 29):
        rows = memory.rows_of(step)
        assert torch.equal(rows, part.rows_of(step))
        assert torch.equal(memory.source.read(step, rows), part.source.read(step, rows))
        told, nothing = torch.arange(8), torch.zeros(8, dtype=torch.bool)
        assert torch.equal(memory.conditioning.train(rows, nothing)[told], part.conditioning.train(rows, nothing)[told])


def test_processes_share_a_batch_without_a_sample_twice(shards, process):
    data = load_dataset(f"wds:{shards}/s-*.tar", resident=30)
    whole, *parts = (Trainer(data, process, PLAN, rank=r, world=w) for r, w in ((0, 1), (0, 2), (1, 2)))
    for step in (0, 5):
        batches = [trainer.source.read(step, trainer.rows_of(step)) for trainer in parts]
        assert torch.equal(torch.cat(batches), whole.source.read(step, whole.rows_of(step)))
        assert not torch.equal(*batches)


def _result(out):
    last = sorted((out / "checkpoints").iterdir())[-1]
    return {path.name: path.read_bytes() for path in (*last.iterdir(), out / "losses.csv", out / "curve.csv")}


class Stop(Exception):
    pass


def test_run_on_shards_is_resumed_bit_identically(shards, process, tmp_path):
    def stop(trainer, loss):
        if trainer.done == 21:
            raise Stop

    data = load_dataset(f"wds:{shards}/s-*.tar", resident=30)
    train(data, process, PLAN, tmp_path / "whole", cadence=CADENCE)
    with pytest.raises(Stop):
        train(data, process, PLAN, tmp_path / "cut", cadence=CADENCE, watch=stop)
    again = load_dataset(f"wds:{shards}/s-*.tar", resident=30)
    train(again, process, PLAN, tmp_path / "cut", cadence=CADENCE)
    assert _result(tmp_path / "whole") == _result(tmp_path / "cut")


def _remove(shard):
    shard.unlink()


def _cut_short(shard):
    shard.write_bytes(shard.read_bytes()[:600])


@pytest.mark.parametrize("harm", [_remove, _cut_short])
def test_data_that_vanish_are_said_and_the_last_good_state_is_kept(harm, shards, process, tmp_path):
    shutil.copytree(shards, tmp_path / "mine")
    data = load_dataset(f"wds:{tmp_path}/mine/s-*.tar", resident=30)

    def vanish(trainer, loss):
        if trainer.done == 3:
            harm(tmp_path / "mine" / "s-001.tar")

    with pytest.raises(DataLost, match=r"s-001\.tar can no longer be read .*; the last good state is") as error:
        train(data, process, PLAN, tmp_path / "run", cadence=CADENCE, watch=vanish)
    assert "\n" not in str(error.value)
    done = int(str(error.value).split("checkpoint ")[1].split()[0])
    assert 3 <= done < PLAN.steps
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    shutil.copyfile(shards / "s-001.tar", tmp_path / "mine" / "s-001.tar")
    told = []
    train(data, process, PLAN, tmp_path / "run", cadence=CADENCE, tell=told.append)
    assert f"after step {done}" in told[0]
    train(data, process, PLAN, tmp_path / "whole", cadence=CADENCE)
    assert _result(tmp_path / "whole") == _result(tmp_path / "run")


def test_latents_of_large_data_are_those_from_memory(shards, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from difficulty import latents

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(4,), norm_num_groups=2, sample_size=4
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(latents, "CHUNK", 8)
    monkeypatch.setattr(latents, "BLOCK", 16)
    spec, autoencoder = f"wds:{shards}/s-*.tar", latents.Autoencoder(tmp_path)
    for posterior in latents.POSTERIORS:
        whole = latents.latent_dataset(load_dataset(spec), autoencoder, posterior)
        part = latents.latent_dataset(load_dataset(spec, resident=30), autoencoder, posterior)
        assert part.large is None
        assert torch.equal(part.train, whole.train)
        assert torch.equal(part.labels, whole.labels)


def test_captions_of_samples_that_are_not_in_memory_are_embedded(shards, table):
    from training.text import Text, TextTable

    data = load_dataset(f"hf:{table / 'arrow'}", resident=30)
    captions = ("", *sorted({*data.trained_captions, *data.heldout_captions}))
    pooled = torch.arange(len(captions), dtype=torch.float32)[:, None]

    class Encoder:
        trained, spec, fingerprint = False, "own", "0"

    text = Text(pooled[:, None], torch.ones(len(captions), 1, dtype=torch.bool), pooled)
    embedded = TextTable(captions, text, Encoder())
    told = conditioning("text", data, embedded).train(torch.tensor([70, 3]), torch.tensor([False, True]))
    assert captions[int(told.pooled[0])] == data.trained_captions[70]
    assert captions[int(told.pooled[1])] == ""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wds:https://example.com/a.tar", "not on this machine"),
        ("wds:pipe:cat a.tar", "not on this machine"),
        ("wds:/nowhere/{000..003}.tar", "000.tar, which does not exist"),
        ("wds:/nowhere/*.tar", "names no file"),
        ("hf:/nowhere/at/all", "cannot load hf:"),
    ],
)
def test_names_of_nothing_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        load_dataset(spec)


def _write(path, samples):
    with webdataset.TarWriter(str(path)) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"{i:03d}"} | sample)
    return f"wds:{path}"


def test_shards_that_cannot_be_used_are_refused(tmp_path):
    good = [{"npy": np.zeros((1, 2, 2))} for _ in range(30)]
    with pytest.raises(InputError, match="has 5 samples; at least 20"):
        load_dataset(_write(tmp_path / "few.tar", good[:5]))
    with pytest.raises(InputError, match="no image or array"):
        load_dataset(_write(tmp_path / "none.tar", [{"txt": "x"}]))
    with pytest.raises(InputError, match="samples differ in size"):
        load_dataset(_write(tmp_path / "sizes.tar", [*good, {"npy": np.zeros((1, 3, 3))}]))
    with pytest.raises(InputError, match="NaN or infinite"):
        load_dataset(_write(tmp_path / "nan.tar", [*good, {"npy": np.full((1, 2, 2), np.nan)}]))
    with pytest.raises(InputError, match="no whole number"):
        load_dataset(_write(tmp_path / "labels.tar", [good[0] | {"cls": b"cat"}]))
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_dataset(_write(tmp_path / "broken.tar", [{"png": b"no picture"}] * 30))
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as packed:
        packed.add(tmp_path / "few.tar", "few.npy")
    with pytest.raises(InputError, match="uncompressed tar"):
        load_dataset(f"wds:{tmp_path}/packed.tar")


def test_missing_datasets_library_is_said_in_a_sentence(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"install denoising-difficulty\[hub\]"):
        load_dataset(f"hf:{table / 'arrow'}")
