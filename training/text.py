"""Captions as a condition: embeddings from a text encoder of transformers, computed once and cached.

An encoder is a folder of ``save_pretrained`` that holds model and tokenizer, a diffusers pipeline with the folders
text_encoder and tokenizer, or a name on the hub: CLIP, T5 and whatever else transformers counts as a text encoder. Its
weights stay as they are. A caption becomes

    tokens   (L, d)   the last hidden states, which UNet and DiT attend to
    pooled   (d,)     the encoder's own pooled output, or the mean over the tokens where it has none

and the empty caption stands for "no caption given", as in Rombach et al. 2022 (arXiv 2112.10752). Weights are read from
safetensors only and no code that comes with a model is run.

``train_text_encoder`` makes such a folder from the data's own images and captions: a small CLIP (Radford et al. 2021,
arXiv 2103.00020) that learns which caption belongs to which image, of which the text half is kept.
"""

__all__ = ["Text", "TextEncoder", "TextTable", "train_text_encoder"]

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difficulty.cache import cache_folder, cached_tensors
from difficulty.datasets import Dataset
from difficulty.errors import InputError, first_line
from difficulty.pretrained import find_part, fingerprint_folders, model_files, root_folder
from difficulty.randomness import stream, torch_generator
from difficulty.records import digest
from training.streams import BATCH

MOST_TOKENS = 256
CHUNK = 64  # captions per forward pass
PIPELINE_PARTS = ("text_encoder", "tokenizer")
# The small CLIP: enough for captions of a few words about small images, and seconds on one core.
TINY = {"width": 64, "layers": 2, "heads": 4, "projection": 32, "tokens": 32, "steps": 300, "batch": 128, "lr": 1e-3}


@dataclass(frozen=True, eq=False)
class Text:
    """Embedded captions of a batch.

    Args:
        tokens: float32 (B, L, d).
        mask: bool (B, L), false where a token is padding.
        pooled: float32 (B, d).
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: slice | Tensor) -> "Text":
        return Text(self.tokens[rows], self.mask[rows], self.pooled[rows])

    def padded(self, length: int) -> "Text":
        """The same in at least so many tokens."""
        missing = max(length - self.mask.shape[1], 0)
        tokens = torch.nn.functional.pad(self.tokens, (0, 0, 0, missing))
        return Text(tokens, torch.nn.functional.pad(self.mask, (0, missing)), self.pooled)

    def to(self, device: torch.device | str) -> "Text":
        """The same on a device."""
        return Text(self.tokens.to(device), self.mask.to(device), self.pooled.to(device))


@dataclass(frozen=True, eq=False)
class TextTable:
    """Different captions and their embeddings; the first is the empty one.

    Args:
        captions: row to caption.
        text: the embeddings, a row each.
        encoder: what made them.
    """

    captions: tuple[str, ...]
    text: Text
    encoder: "TextEncoder"

    @functools.cached_property
    def _row(self) -> dict[str, int]:
        return {caption: row for row, caption in enumerate(self.captions)}

    def rows(self, captions: Sequence[str]) -> Tensor:
        """Rows of captions, int64 (n,)."""
        return torch.tensor([self._row[caption] for caption in captions], dtype=torch.int64)

    def of(self, captions: Sequence[str]) -> Text:
        """Embeddings of captions that are in the table."""
        return self.text[self.rows(captions)]


class TextEncoder:
    """A text encoder by folder or name on the hub; the model is loaded when a caption must be computed.

    Args:
        spec: see the head of the module.
        trained: whether it was trained here, on the data of the run (``train_text_encoder``).

    Raises:
        InputError: if transformers is missing or there is no text encoder in safetensors.
    """

    def __init__(self, spec: str | Path, *, trained: bool = False) -> None:
        self.spec, self.trained = str(spec), trained
        _transformers()
        root = root_folder(self.spec, PIPELINE_PARTS)
        self.folder = find_part(root, "text_encoder", "config.json")
        self.tokenizer_folder = find_part(root, "tokenizer", "tokenizer_config.json", weights=False)
        self.fingerprint = fingerprint_folders(self.folder, self.tokenizer_folder)

    @functools.cached_property
    def model(self) -> Any:
        """The encoder itself, in evaluation mode."""
        transformers = _transformers()
        options = {"use_safetensors": True, "trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            # The auto class would load a whole CLIP, which wants images, and knows only its text half by itself.
            loader = transformers.AutoModelForTextEncoding
            if config.model_type == "clip":
                loader = transformers.CLIPTextModel
            found, report = loader.from_pretrained(self.folder, output_loading_info=True, **options)
        except Exception as error:  # transformers raises many kinds for foreign, missing or truncated files
            raise InputError(f"{self.spec} holds no text encoder that can be used ({first_line(error)})") from None
        if report["missing_keys"]:
            raise InputError(f"{self.spec} lacks weights of its text encoder, such as {min(report['missing_keys'])}")
        return found.eval().requires_grad_(False)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to it."""
        try:
            found = _transformers().AutoTokenizer.from_pretrained(self.tokenizer_folder, trust_remote_code=False)
        except Exception as error:  # as above
            raise InputError(f"{self.spec} holds no tokenizer that can be used ({first_line(error)})") from None
        if found.pad_token is None:
            found.pad_token = found.eos_token
        return found

    def table(self, captions: Sequence[str], tell: Callable[[str], None] = lambda message: None) -> TextTable:
        """Embeddings of the different ones among captions, and of the empty one, from the cache where they are there.

        Raises:
            InputError: if the model cannot be used, or its output is not finite.
        """
        different = ("", *sorted(set(captions) - {""}))
        facts = {
            "encoder": self.fingerprint,
            "captions": hashlib.sha256(json.dumps(different).encode()).hexdigest(),
            "count": len(different),
            "most_tokens": MOST_TOKENS,
        }
        found = cached_tensors("captions", facts, lambda: self._encode(different, tell), tell)
        return TextTable(different, Text(found["tokens"], found["mask"], found["pooled"]), self)

    @torch.no_grad()
    def _encode(self, captions: Sequence[str], tell: Callable[[str], None]) -> dict[str, Tensor]:
        model, tokenizer = self.model, self.tokenizer
        positions = getattr(model.config, "max_position_embeddings", MOST_TOKENS)
        limit = min(tokenizer.model_max_length, positions, MOST_TOKENS)
        encoded = tokenizer(list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
        cut = sum(len(row) > limit for row in tokenizer(list(captions), verbose=False)["input_ids"])
        if cut:
            tell(f"{cut} caption(s) are longer than the {limit} tokens that {self.spec} reads; the rest is cut off")
        tokens, pooled = [], []
        for first in range(0, len(ids), CHUNK):
            part = slice(first, first + CHUNK)
            output = model(input_ids=ids[part], attention_mask=mask[part].long())
            hidden, kept = output.last_hidden_state.float(), mask[part, :, None]
            own = getattr(output, "pooler_output", None)
            # Padding says nothing, whatever an encoder makes of it.
            tokens.append(torch.where(kept, hidden, 0.0))
            pooled.append((hidden * kept).sum(1) / kept.sum(1) if own is None else own.float())
        result = {"tokens": torch.cat(tokens), "mask": mask, "pooled": torch.cat(pooled)}
        if not all(torch.isfinite(tensor).all() for tensor in (result["tokens"], result["pooled"])):
            raise InputError(f"the embeddings of {self.spec} are not finite; it may need another precision")
        return result

    def copy(self, folder: Path) -> None:
        """Copy encoder and tokenizer to a folder that does not exist yet, whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        for source in {self.folder, self.tokenizer_folder}:
            for file in model_files(source):
                shutil.copyfile(file, temporary / file.name)
        _publish(temporary, folder)


def train_text_encoder(data: Dataset, seed: int = 0) -> TextEncoder:
    """A small text encoder that learned from the train images and captions of a data set, cached by both.

    Args:
        data: square images with captions.
        seed: of weights and batches.

    Raises:
        InputError: if the data have no captions or are no square images, or transformers is missing.
    """
    if data.captions is None:
        raise InputError(f"data set {data.name!r} has no captions")
    if len(data.shape) != 3 or data.shape[1] != data.shape[2]:
        raise InputError(
            f"a tiny text encoder learns from square images, {data.name!r} has samples of shape {data.shape}; "
            "name a folder with a text encoder instead"
        )
    captions = hashlib.sha256(json.dumps(data.captions).encode()).hexdigest()
    facts = {"data": data.fingerprint, "captions": captions, "recipe": TINY, "seed": seed, "version": 2}
    folder = cache_folder() / f"text-encoder-{digest(facts)[:24]}"
    if not folder.is_dir():
        model, tokenizer = _train_clip(data, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".text-encoder."))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _publish(temporary, folder)
    return TextEncoder(folder, trained=True)


def _train_clip(data: Dataset, seed: int) -> tuple[Any, Any]:
    """Text half and tokenizer of a CLIP trained on the data."""
    transformers = _transformers()
    assert data.captions is not None
    tokenizer = _train_tokenizer(sorted(set(data.captions)))
    size, heads, projection = (int(TINY[name]) for name in ("width", "heads", "projection"))
    shared = {
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_hidden_layers": TINY["layers"],
        "num_attention_heads": heads,
        "projection_dim": projection,
    }
    text = shared | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TINY["tokens"],
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    channels, side, _ = data.shape
    patch = next(p for p in range(max(side // 8, 1), side + 1) if side % p == 0)
    vision = shared | {"image_size": side, "patch_size": patch, "num_channels": channels}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    encoded = tokenizer(list(data.captions), padding=True, truncation=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    steps, batch = int(TINY["steps"]), min(int(TINY["batch"]), len(data.train))
    # transformers draws initial weights from torch's global generator; it is seeded for the call and restored after.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(torch_generator(seed).initial_seed())
        clip = transformers.CLIPModel(config).train()
        optimizer = torch.optim.AdamW(clip.parameters(), lr=float(TINY["lr"]))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            rows = torch.from_numpy(stream(seed, BATCH, step, 0).integers(0, len(data.train), batch))
            loss = clip(
                input_ids=ids[rows], attention_mask=mask[rows], pixel_values=data.train[rows], return_loss=True
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    half = transformers.CLIPTextModel(clip.config.text_config)
    half.load_state_dict(clip.text_model.state_dict())
    return half.eval(), tokenizer


def _train_tokenizer(captions: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer (no word is unknown to it) of the captions' own words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    # An end token of number 2 means an old CLIP to transformers, which then pools at the token of the highest number.
    special = ("<pad>", "<start>", "<unused>", "<end>")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=1024, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[3],
        model_max_length=int(TINY["tokens"]),
        model_input_names=["input_ids", "attention_mask"],
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError("captions need transformers; install denoising-difficulty[text]") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _publish(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name; one of that name that was there first stays."""
    os.chmod(temporary, 0o755)
    try:
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise InputError(f"cannot write {folder}") from None
