"""Captions as a condition, through one path for encoders of every kind."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers_configs import TEXT, UNET

from difficulty.datasets import load_dataset, split_samples
from difficulty.errors import InputError
from difficulty.networks import build_network
from difficulty.process import get_process
from training import text
from training.accuracy import ClassJudge, seen_captions
from training.cli import main as training_main
from training.conditional import Captions, Guided, TextNetwork, given
from training.run import Cadence, restore, train
from training.sampling import draw_samples
from training.text import Text, TextEncoder, train_text_encoder
from training.trainer import Trainer, TrainPlan

transformers = pytest.importorskip("transformers")

LEFT, RIGHT = ("bright on the left", "the left side"), ("bright on the right", "the right side")
METRIC = ["--metrics", "sw-pixels", "--json"]  # the cheapest
PLAN = TrainPlan(
    steps=250, batch=32, network="dit:width=32,depth=2,heads=2", prediction="v", lr=5e-3, condition="text", warmup=10
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def process():
    return get_process("vp-cosine:T=80")


@pytest.fixture(scope="module")
def halves():
    """Pictures of 4 x 4 pixels that are bright on one side, with two phrasings for each side."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    pictures = 0.1 * rng.normal(size=(300, 1, 4, 4)) - 0.5
    for picture, label in zip(pictures, labels, strict=True):
        picture[:, :, 2 * label : 2 * label + 2] += 1.0
    captions = [(LEFT, RIGHT)[label][rng.integers(2)] for label in labels]
    unseen = (("the side on the left is bright", 0), ("the side on the right is bright", 1))
    return split_samples("halves", pictures, labels=labels, captions=captions, unseen_captions=unseen)


@pytest.fixture(scope="module")
def tiny(halves):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(text.TINY, "steps", 60)
        patch.setitem(text.TINY, "batch", 32)
        return train_text_encoder(halves)


@pytest.fixture(scope="module")
def table(tiny, halves):
    return tiny.table([*halves.captions, *halves.heldout_captions])


@pytest.fixture(scope="module")
def trained(halves, process, table):
    torch.set_num_threads(1)
    trainer = Trainer(halves, process, PLAN, text=table)
    for _ in range(PLAN.steps):
        trainer.step()
    return trainer


def _save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Encoders of every kind with random weights and one tokenizer."""
    root = tmp_path_factory.mktemp("encoders")
    size = len(tiny.tokenizer)
    torch.manual_seed(0)
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=size, **small))
    vision = small | {"image_size": 4, "patch_size": 2}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=small | {"vocab_size": size, "eos_token_id": 2}, vision_config=vision)
    )
    made = {"t5": t5, "bert": bert, "clip with its image half": whole}
    places = {name: _save(model, tiny.tokenizer, root / name) for name, model in made.items()}
    tiny.model.save_pretrained(root / "pipeline" / "text_encoder")
    tiny.tokenizer.save_pretrained(root / "pipeline" / "tokenizer")
    return places | {"pipeline": root / "pipeline", "tiny": tiny.folder}


KINDS = ("t5", "bert", "clip with its image half", "pipeline", "tiny")


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_embedded_alike_whatever_captions_are_beside_it(kind, folders):
    encoder = TextEncoder(folders[kind])
    alone = encoder.table(["the left side"])
    beside = encoder.table(["the left side", "a much longer caption about what is bright on the left side"])
    assert alone.captions[0] == beside.captions[0] == ""
    length = int(alone.of(["the left side"]).mask.sum())
    one, two = alone.of(["the left side"]), beside.of(["the left side"])
    assert int(two.mask.sum()) == length < two.mask.shape[1]
    assert torch.allclose(one.tokens[:, :length], two.tokens[:, :length], atol=1e-5)
    assert torch.allclose(one.pooled, two.pooled, atol=1e-5)
    assert (two.tokens[:, length:] == 0).all()
    assert not torch.equal(two.pooled, beside.text.pooled[:1])  # the empty caption is another


def test_encoder_without_a_pooled_output_is_pooled_by_the_mean_over_tokens(folders):
    found = TextEncoder(folders["t5"]).table(["the left side"]).of(["the left side"])
    assert torch.allclose(found.pooled[0], found.tokens[0][found.mask[0]].mean(0), atol=1e-6)


def test_embeddings_are_computed_once_for_the_same_weights_wherever_they_are(folders, tmp_path, monkeypatch):
    first = TextEncoder(folders["t5"]).table(["the left side"])
    shutil.copytree(folders["t5"], tmp_path / "copy")
    monkeypatch.setattr(TextEncoder, "_encode", lambda *_: pytest.fail("computed again"))
    again = TextEncoder(tmp_path / "copy").table(["the left side", "", "the left side"])
    assert torch.equal(first.text.tokens, again.text.tokens)


def test_other_weights_are_another_encoder(folders, tmp_path):
    shutil.copytree(folders["t5"], tmp_path / "copy")
    model = TextEncoder(tmp_path / "copy").model
    with torch.no_grad():
        next(iter(model.parameters())).add_(1e-3)
    model.save_pretrained(tmp_path / "copy")
    changed, before = TextEncoder(tmp_path / "copy"), TextEncoder(folders["t5"])
    assert changed.fingerprint != before.fingerprint
    assert not torch.equal(changed.table(["left"]).text.tokens, before.table(["left"]).text.tokens)


def test_captions_that_differ_in_one_word_have_summaries_of_their_own(monkeypatch):
    monkeypatch.setitem(text.TINY, "steps", 20)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200)
    pictures = 0.1 * rng.normal(size=(200, 1, 4, 4)) + labels[:, None, None, None] / 10
    data = split_samples("numbered", pictures, captions=[f"digit={label}" for label in labels])
    captions = [f"digit={label}" for label in range(10)]
    pooled = train_text_encoder(data).table(captions).of(captions).pooled
    apart = (pooled[:, None] - pooled[None]).abs().amax(-1)
    assert apart[~torch.eye(10, dtype=bool)].min() > 1e-3


def test_long_captions_are_cut_off_with_a_sentence(tiny):
    told = []
    tiny.table(["left " * 100], told.append)
    assert "1 caption(s) are longer than the 32 tokens" in told[0]


def test_tiny_encoder_learns_which_captions_mean_the_same_from_pictures_alone(tiny):
    pooled = torch.nn.functional.normalize(tiny.table([*LEFT, *RIGHT]).of([*LEFT, *RIGHT]).pooled)
    similar = pooled @ pooled.T
    assert min(similar[0, 1], similar[2, 3]) > similar[:2, 2:].max() + 0.3


@pytest.mark.parametrize("name", ["mlp", "unet", "dit"])
def test_untrained_captions_say_nothing_and_padding_never_does(name, table):
    network = TextNetwork(build_network(name, (1, 4, 4), 0), width=64, null_tokens=3)
    x, log_snr = torch.randn(2, 1, 4, 4), torch.linspace(-3, 3, 2)
    for parameter_name, parameter in network.named_parameters():  # zero-initialised outputs would hide everything
        if (parameter == 0).all() and "part" not in parameter_name and "cross" not in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    told = table.of([LEFT[0], RIGHT[1]])
    assert torch.equal(network(x, log_snr), network(x, log_snr, told))
    for parameter in network.parameters():
        if (parameter == 0).all():
            torch.nn.init.normal_(parameter, std=0.3)
    out = network(x, log_snr, told)
    assert not torch.allclose(out, network(x, log_snr), atol=1e-3)
    junk = torch.full((2, 4, 64), 1e3)
    padded = Text(torch.cat([told.tokens, junk], 1), torch.cat([told.mask, junk[..., 0] < 0], 1), told.pooled)
    assert torch.allclose(network(x, log_snr, padded), out, atol=1e-5)
    if name != "mlp":  # tokens are heard beside the pooled embedding
        swapped = Text(told.tokens.flip(0), told.mask.flip(0), told.pooled)
        assert not torch.allclose(network(x, log_snr, swapped), out, atol=1e-3)


def test_samples_obey_captions_that_were_seen_and_phrasings_that_were_not(trained, halves, table):
    judge = ClassJudge(halves)
    for pairs in (seen_captions(halves), list(halves.unseen_captions)):
        asked = [pairs[i % len(pairs)] for i in range(200)]
        captions = [caption for caption, _ in asked]
        condition = table.encoder.table(captions).of(captions)
        samples = draw_samples(trained.ema, 200, halves.shape, seed=0, steps=20, condition=condition, guidance=2.0)
        found = judge(samples, torch.tensor([label for _, label in asked]), captions)
        assert (found["ci_low"] > 0.85).all(), found


def test_null_caption_is_what_the_network_knows_without_one(trained, table):
    x, t = torch.randn(6, 1, 4, 4), torch.full((6,), 50)
    null = table.of([""] * 6)
    assert torch.allclose(trained.ema.x0(x, t), given(trained.ema, null).x0(x, t), atol=1e-6)
    wanted = table.of([LEFT[0]] * 6)
    plain, told = trained.ema.x0(x, t), given(trained.ema, wanted).x0(x, t)
    assert torch.allclose(Guided(trained.ema, wanted, 3.0).x0(x, t), plain + 3 * (told - plain), atol=1e-5)


def test_every_held_out_sample_is_told_its_own_caption(halves, table):
    told = Captions(halves, table).heldout(torch.arange(len(halves.heldout)))
    assert torch.equal(told.pooled, table.of(halves.heldout_captions).pooled)


def test_a_run_that_starts_from_another_has_the_null_caption_of_its_own_captions(halves, process, tiny, tmp_path):
    longer = replace(halves, captions=tuple(f"{caption}, as I said before" for caption in halves.captions))
    plan = TrainPlan(**(vars(PLAN) | {"steps": 2}))
    tables = [tiny.table([*data.captions, *data.heldout_captions]) for data in (halves, longer)]
    assert tables[0].text.mask.shape[1] < tables[1].text.mask.shape[1]
    first = train(halves, process, plan, tmp_path / "first", text=tables[0])
    start = {"init_from": tmp_path / "first", "text": tables[1]}
    second = train(longer, process, TrainPlan(**(vars(plan) | {"lr": 1e-12})), tmp_path / "second", **start)
    assert second.denoiser.network.null_text.shape[1] == tables[1].text.mask.shape[1]
    weight = first.denoiser.network.network.embedding.part.linear.weight
    assert torch.allclose(second.denoiser.network.network.embedding.part.linear.weight, weight, atol=1e-6)


def test_a_run_does_not_start_from_one_of_another_text_encoder(halves, process, tiny, folders, tmp_path):
    plan = TrainPlan(**(vars(PLAN) | {"steps": 2}))
    captions = [*halves.captions, *halves.heldout_captions]
    train(halves, process, plan, tmp_path / "first", text=tiny.table(captions))
    other = TextEncoder(folders["t5"]).table(captions)
    with pytest.raises(InputError, match="are of text encoder"):
        train(halves, process, plan, tmp_path / "second", init_from=tmp_path / "first", text=other)


def test_captions_are_dropped_as_often_as_asked(halves, process, table):
    trainer = Trainer(halves, process, TrainPlan(**(vars(PLAN) | {"condition_dropout": 0.3, "batch": 240})), text=table)
    rows = torch.arange(240)
    dropped = [(trainer._condition(rows, s, slice(240)).pooled == table.text.pooled[0]).all(1) for s in range(50)]
    assert float(torch.cat(dropped).float().mean()) == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 12000))


def test_run_with_captions_is_resumed_bit_identically_and_carries_its_encoder(halves, process, table, tmp_path):
    plan = TrainPlan(**(vars(PLAN) | {"steps": 20}))
    cadence = Cadence(evaluate=10, checkpoint=8, sample=0)

    def stop(trainer, loss):
        if trainer.done == 13:
            raise KeyboardInterrupt

    whole = train(halves, process, plan, tmp_path / "whole", cadence=cadence, text=table)
    with pytest.raises(KeyboardInterrupt):
        train(halves, process, plan, tmp_path / "cut", cadence=cadence, text=table, watch=stop)
    train(halves, process, plan, tmp_path / "cut", cadence=cadence, text=table)
    denoiser, config = restore(tmp_path / "cut")
    moved = TextEncoder(tmp_path / "cut" / "text-encoder")
    assert moved.fingerprint == config["condition"]["fingerprint"]
    wanted = moved.table([RIGHT[0]]).of([RIGHT[0]] * 4)
    one = draw_samples(denoiser, 4, (1, 4, 4), seed=0, steps=5, condition=wanted, guidance=2.0)
    assert torch.equal(one, draw_samples(whole.ema, 4, (1, 4, 4), seed=0, steps=5, condition=wanted, guidance=2.0))
    assert torch.equal(
        draw_samples(denoiser, 4, (1, 4, 4), seed=0, steps=5), draw_samples(whole.ema, 4, (1, 4, 4), seed=0, steps=5)
    )


def test_command_line_goes_from_captions_to_samples_and_accuracies(folders, tmp_path, capsys, monkeypatch):
    def main(args):
        monkeypatch.setattr(sys, "argv", ["training", *args])
        return training_main()

    out = tmp_path / "run"
    small = ["--steps", "3", "--batch", "8", "--network", "mlp:width=8,depth=2", "--sample-every", "0", "--json"]
    args = ["run", "captioned-digits", "--text-encoder", str(folders["bert"]), "--out", str(out), *small]
    assert main(args) == 0
    assert main(["sample", str(out), "--prompt", "a handwritten seven", "--guidance", "2", "--count", "4"]) == 0
    assert np.load(out / "samples.npz")["data"].shape == (4, 1, 8, 8)
    capsys.readouterr()
    assert main(["evaluate", str(out), "captioned-digits", "--samples", "80", "--steps", "3", *METRIC]) == 0
    rows = json.loads(capsys.readouterr().out)["condition"]["accuracy"]
    assert [(row["captions"], row["group"]) for row in rows] == [
        (kind, group) for kind in ("seen", "unseen") for group in ("all", *["class"] * 10)
    ]
    table = (out / "condition.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 11 + 80 + 40
    for refused, message in (
        (["sample", str(out)], "ask for some with --prompt"),
        (["sample", str(out), "--labels", "3"], "without --conditional"),
        (["sample", str(out), "--prompt", "x", "--text-encoder", str(folders["t5"])], "is not the text encoder"),
        ([*args, "--conditional"], "not both"),
    ):
        assert main(refused) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_captions_and_encoders_that_cannot_be_used_are_refused(gaussian, halves, process, table, folders, tmp_path):
    with pytest.raises(InputError, match="no captions"):
        Captions(gaussian, table)
    with pytest.raises(InputError, match="need a text encoder"):
        Trainer(halves, process, PLAN)
    with pytest.raises(InputError, match="square images"):
        train_text_encoder(split_samples("line", np.eye(30, 3), captions=["x"] * 30))
    with pytest.raises(InputError, match=r"no config\.json"):
        TextEncoder(tmp_path)
    shutil.copytree(folders["t5"], tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no weights as \.safetensors"):
        TextEncoder(tmp_path / "pickled")
    shutil.copytree(folders["t5"], tmp_path / "cut")
    content = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="no text encoder that can be used"):
        TextEncoder(tmp_path / "cut").table(["x"])


def test_captioned_digits_are_the_digits_described_by_their_numeral():
    plain, data = load_dataset("digits"), load_dataset("captioned-digits")
    assert torch.equal(plain.train, data.train)
    assert torch.equal(plain.labels, data.labels)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    pairs = [*zip(data.captions, data.labels.tolist(), strict=True), *data.unseen_captions]
    assert all((names[label] in caption) != (str(label) in caption) for caption, label in pairs)
    unseen = {caption for caption, _ in data.unseen_captions}
    assert len(unseen) == 40
    assert not unseen & {*data.captions, *data.heldout_captions}
    assert len(seen_captions(data)) == 80


def test_captions_reach_a_diffusers_network_by_its_own_inputs(halves, process, table, tiny, tmp_path):
    pytest.importorskip("diffusers")
    (tmp_path / "text.json").write_text(json.dumps(TEXT | {"sample_size": 4, "cross_attention_dim": 64}))
    plan = TrainPlan(**(vars(PLAN) | {"network": f"diffusers:{tmp_path}/text.json", "steps": 2, "batch": 8}))
    trainer = Trainer(halves, process, plan, text=table)
    trainer.step()
    # Asked for with fewer tokens than in training, it is given as many: some models of diffusers know no mask.
    short, lengths = tiny.table([LEFT[1][:4]]), []
    network = trainer.denoiser.network.network
    network.register_forward_pre_hook(lambda _, x, told: lengths.append(told["text"][0].shape[1]), with_kwargs=True)
    assert short.text.mask.shape[1] < table.text.mask.shape[1]
    given(trainer.denoiser, short.text).x0(torch.randn(2, 1, 4, 4), torch.tensor([40, 40]))
    assert lengths == [table.text.mask.shape[1]]
    keys = trainer.denoiser.network.network.model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    assert float(keys.grad.abs().sum()) > 0
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([40, 40])
    left, right = (given(trainer.denoiser, table.of([caption] * 2)) for caption in (LEFT[0], RIGHT[0]))
    assert not torch.allclose(left.eps(x, t), right.eps(x, t), atol=1e-6)
    assert torch.allclose(trainer.denoiser.eps(x, t), given(trainer.denoiser, table.of([""] * 2)).eps(x, t), atol=1e-5)
    (tmp_path / "other.json").write_text(json.dumps(TEXT))
    (tmp_path / "deaf.json").write_text(json.dumps(UNET | {"sample_size": 4}))
    for name, message in (("other", "tokens of width 6, but the text encoder gives 64"), ("deaf", "takes no text")):
        plan = TrainPlan(**(vars(PLAN) | {"network": f"diffusers:{tmp_path}/{name}.json"}))
        with pytest.raises(InputError, match=message):
            Trainer(halves, process, plan, text=table)


def test_missing_transformers_is_said_in_a_sentence(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"install denoising-difficulty\[text\]"):
        TextEncoder(tiny.folder)
