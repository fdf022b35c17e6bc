"""Tiny frozen parts as local folders and files, and pictures for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flamingo.serving.styles import STYLES, Message, written

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopq"]
WIDTH, LAYERS, TABLE = 32, 4, 24  # the LM's table is padded, as tables often are
SIDE = 32  # pixels
ARCHITECTURE = "tiny-of"


def make_tokenizer(added: tuple[str, ...] = (), pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per word; the added ones come last."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    special = {"pad_token": "<pad>"} if pad else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<pad>", **special
    )
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random weights everywhere, open gates too: a zero anywhere would hide what it multiplies."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def shake() -> Callable[..., None]:
    return randomise


@pytest.fixture(scope="session")
def turns_end_with() -> Callable[[str, Any], None]:
    """check(token, processor): each answer of a prompt, however it is written, ends with this token once."""

    def check(token: str, processor: Any) -> None:
        told = [Message("user", "<image> a b"), Message("assistant", " c"), Message("user", "<image> d")]
        picture, end = Image.new("RGB", (16, 16)), processor.end_of_chunk_token_id
        for style in STYLES:
            text = written(told, style, processor)
            (ids,) = processor.token_ids([text])
            assert ids.count(end) == 1
            assert processor(text=text, images=[picture] * 2)["input_ids"].tolist() == [ids]
        assert processor.marked("a<|endofchunk|>") == f"a{token}"

    return check


@pytest.fixture
def beginning(tmp_path) -> Callable[[Path], Path]:
    """A copy of a folder whose tokenizer puts <s> before each text by itself, as LLaMA's do."""

    def copy(folder: Path) -> Path:
        shutil.copytree(folder, tmp_path / "beginning")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        tokenizer.save_pretrained(tmp_path / "beginning")
        return tmp_path / "beginning"

    return copy


@pytest.fixture(scope="session")
def begin() -> Callable[[Any, int], None]:
    """check(processor, first): every text begins with this token, once."""

    def check(processor: Any, first: int) -> None:
        bare, written = processor.token_ids(["<image> a", "<s> <image> a"])
        assert bare == written and bare.count(first) == 1 and bare[0] == first
        picture = Image.new("RGB", (16, 16))
        assert processor(text="<image> a", images=picture)["input_ids"].tolist() == [bare]

    return check


@pytest.fixture(scope="session")
def language(tmp_path_factory) -> Callable[..., Path]:
    """language("opt"): a folder with a random LM of this family and its tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str, key: str = "", **fields) -> Path:
        if family + key not in made:
            sizes = {"vocab_size": TABLE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            if family == "mpt":
                sizes |= {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}
            else:
                sizes |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
                sizes |= {"intermediate_size": 48, "max_position_embeddings": 64}
            if family == "opt":
                sizes |= {"word_embed_proj_dim": fields.get("hidden_size", WIDTH), "ffn_dim": 48}
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **fields}))
            randomise(lm)
            lm.save_pretrained(folder)
            # GPT-NeoX and MPT tokenizers have no pad: OpenFlamingo adds <PAD> to them.
            make_tokenizer(pad=family in ("opt", "llama")).save_pretrained(folder)
            made[family + key] = folder
        return made[family + key]

    return make


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A file of weights of a tiny CLIP, whose architecture open_clip then knows."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
    }
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    model = open_clip.create_model(ARCHITECTURE)
    randomise(model)
    torch.save(model.state_dict(), folder / "clip.pt")
    return folder / "clip.pt"


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    """float[4, 3, 32, 32]."""
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
