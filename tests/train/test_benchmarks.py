"""The benchmark against OpenFlamingo: both sides learn the same tokens, and compute the same."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("open_flamingo", reason="pip install --no-deps open-flamingo==2.0.1 einops-exts")
pytest.importorskip("benchmarks.train", reason="the benchmarks lie beside the package, in the repository")

from benchmarks import mixture, ours, train  # noqa: E402
from flamingo.checkpoints.openflamingo import convert  # noqa: E402
from flamingo.modeling import FlamingoForConditionalGeneration  # noqa: E402

ROW = {
    "side", "seconds", "samples_per_second", "times_as_fast", "times_as_fast_range", "peak_mib",
    "peak_ratio", "loaded_mib", "tokens", "images", "targets", "first_losses",
}  # fmt: skip
SMALL = ["--resampler-depth", "1", "--rounds", "1", "--warmup", "0"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A tiny random LLaMA that knows the mixture's words, and a tiny encoder, as folders."""
    folder = tmp_path_factory.mktemp("frozen")
    vocabulary = {word: i for i, word in enumerate(["</s>", *dict.fromkeys(mixture.WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder / "lm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": len(vocabulary), "initializer_range": 0.3}
    config = AutoConfig.for_model("llama", **sizes, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "lm")
    encoder = timm.create_model("test_efficientnet", num_classes=0)
    (folder / "encoder").mkdir()
    save_file(encoder.state_dict(), folder / "encoder" / "model.safetensors")
    (folder / "encoder" / "config.json").write_text(json.dumps({"architecture": "test_efficientnet"}))
    return train.arguments(
        ["--language", str(folder / "lm"), "--vision", f"timm:{folder / 'encoder'}", "--every", "2"]
        + ["--captions", "3", "--documents", "2", "--precision", "fp32", *SMALL]
    )


@pytest.fixture(scope="module")
def step(options) -> mixture.Step:
    return next(mixture.steps(0, options.captions, options.documents, train.image_size(options.vision)))


class InThisProcess:
    """Stands for a worker."""

    loaded = 100.0

    def __init__(self, load, steps):
        self.side, self.steps = load(), steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def step(self, number):
        result = self.side.train(self.side.prepare(self.steps[number]))
        targets = sorted(result.pop("targets").tolist())
        return {**result, "targets": len(targets), "digest": str(targets), "seconds": 1.0, "peak": 5.0}


@pytest.fixture(scope="module")
def theirs(options):
    """Their side with open gates, before any step."""
    torch.manual_seed(0)
    side = train.their_side(options, tuned=False)
    with torch.no_grad():
        for name, parameter in side.model.module.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    return side


@pytest.fixture(scope="module")
def ours_with_their_weights(options, theirs, tmp_path_factory):
    """savings -> our side, with all that theirs has to train."""
    folder = tmp_path_factory.mktemp("converted")
    model = theirs.model.module
    state = theirs.train_utils.filter_state_dict_to_trainable(model, model.state_dict())
    torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / "checkpoint.pt")
    convert(folder / "checkpoint.pt", options.vision, options.language, options.every, folder / "model")

    def make(savings: ours.Savings) -> ours.Ours:
        _, processor = ours.load(options.vision, options.language, savings, train.architecture(options))
        model = FlamingoForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
        weights = train.WEIGHTS
        return ours.Ours(ours.equip(model, savings), processor, savings, torch.float32, weights, 256)

    return make


def test_both_sides_train_on_the_same_tokens_and_say_the_same_losses(step, theirs, ours_with_their_weights):
    side = ours_with_their_weights(ours.Savings.first(ours.STANDARD))
    mine, other = (each.train(each.prepare(step)) for each in (side, theirs))
    assert sorted(mine["targets"].tolist()) == sorted(other["targets"].tolist())
    assert mine["losses"] == pytest.approx(other["losses"], rel=1e-4)
    assert mine["tokens"] < other["tokens"]  # padding
    assert mine["images"] == sum(len(s.pictures) for s in (*step.captions, *step.documents))
    assert other["images"] == len(step.captions) + 6 * len(step.documents)


@pytest.mark.parametrize(
    "part, without", [("opponent", ["openflamingo"]), ("savings", ["plain loop", "+ own_rows"])]
)
def test_a_side_keeps_freed_memory_only_where_that_is_of_its_own(options, monkeypatch, part, without):
    kept: list[str] = []
    named = argparse.Namespace(**{**vars(options), "part": part})
    for name, load in train.sides(named).items():
        monkeypatch.setattr(train, "keep_freed_memory", partial(kept.append, name))
        load()
    assert kept == [name for name in train.sides(named) if name not in without]


@pytest.fixture(scope="module")
def plain(step, ours_with_their_weights):
    """(losses, number of trained parameters) of the plain loop."""
    side = ours_with_their_weights(ours.Savings())
    return side.train(side.prepare(step))["losses"], sum(p.numel() for p in side.trained)


COUNTS = [*range(1, len(ours.NAMES)), pytest.param(len(ours.NAMES), marks=pytest.mark.slow)]  # it compiles


@pytest.mark.parametrize("count", COUNTS)
def test_no_saving_changes_the_loss(step, ours_with_their_weights, plain, count):
    savings = ours.Savings.first(count)
    if savings.frozen_bfloat16:  # rounds, and this model was loaded in float32 anyway
        savings = ours.Savings(**{**asdict(savings), "frozen_bfloat16": False})
    side = ours_with_their_weights(savings)
    assert side.train(side.prepare(step))["losses"] == pytest.approx(plain[0], rel=1e-4)
    assert sum(p.numel() for p in side.trained) < plain[1]  # two rows instead of a table


@pytest.mark.parametrize("count", COUNTS[-2:])
def test_cached_pictures_are_encoded_once(step, ours_with_their_weights, count):
    side = ours_with_their_weights(ours.Savings.first(count))
    batches, seen = side.prepare(step), []
    side.model.vision_encoder.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    losses = [side.train(batches)["losses"] for _ in range(3)]
    assert sum(seen) == sum(len(batch.pixel_values) for batch in batches)
    assert losses[2] < losses[0]  # and it learns


@pytest.mark.slow
def test_the_benchmark_prints_a_line_for_each_side_and_a_table(options, monkeypatch, capsys):
    monkeypatch.setattr(train, "Worker", InThisProcess)
    given = ["opponent", "--language", options.language, "--vision", options.vision, "--every", "2"]
    train.main([*given, "--captions", "2", "--documents", "1", *SMALL])
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["side"] for row in rows] == list(train.sides(train.arguments(given)))
    assert all(row.keys() == ROW for row in rows)
    assert len({row["targets"] for row in rows}) == 1
    table = "\n".join(line for line in lines if not line.startswith("{"))
    assert "samples/s" in table and "peak ratio" in table


def test_sides_that_learn_different_tokens_are_refused():
    side = {"targets": 5, "digest": "a"}
    train.check_same_targets([{"a": side, "b": dict(side)}])
    with pytest.raises(ValueError, match="step 1"):
        train.check_same_targets([{"a": side}, {"a": side, "b": {"targets": 5, "digest": "b"}}])


def test_a_step_is_the_same_whoever_asks():
    first, again = (list(islice(mixture.steps(3, 2, 1, 8), 2)) for _ in range(2))
    assert first == again and first[0] != first[1]
    lengths = [sum(len(text.split()) for text in s.texts) for step in first for s in step.documents]
    assert all(40 <= length <= 200 for length in lengths)


@pytest.mark.slow
def test_every_side_runs_in_a_process_of_its_own_that_tells_its_memory(options):
    import subprocess

    given = ["--language", options.language, "--vision", options.vision, "--every", "2"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.train",
            *given,
            "--captions",
            "2",
            "--documents",
            "1",
            "--rounds",
            "1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 4 and all(row["peak_mib"] > 0 and row["seconds"] > 0 for row in rows)
