"""The benchmark against OpenFlamingo's evaluation: the same weights, prompts and answers on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("open_flamingo", reason="pip install --no-deps open-flamingo==2.0.1 einops-exts")
pytest.importorskip("easy_vqa", reason="pip install easy-vqa==1.0")
pytest.importorskip("benchmarks.evaluation", reason="the benchmarks lie beside the package")

from benchmarks import evaluation  # noqa: E402
from flamingo.eval.benchmarks import easy_vqa  # noqa: E402

SMALL = ["--every", "2", "--resampler-depth", "1", "--rounds", "1", "--queries", "6", "--random-queries", "4"]
SMALL += ["--their-queries", "3", "--pool", "5", "--batch", "2", "--shots", "0", "3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """A tiny random LLaMA that knows the words of easy-VQA, and a tiny encoder."""
    folder: Path = tmp_path_factory.mktemp("frozen")
    examples = easy_vqa.examples(None, "test")[:400]
    said = {w for e in examples for w in (easy_vqa.prompt(e) + easy_vqa.completion(e)).split()}
    vocabulary = {word: i for i, word in enumerate(["</s>", *sorted(said)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>").save_pretrained(
        folder / "lm"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": len(vocabulary), "initializer_range": 0.3}
    config = AutoConfig.for_model("llama", **sizes, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "lm")
    encoder = timm.create_model("test_efficientnet", num_classes=0)
    (folder / "encoder").mkdir()
    save_file(encoder.state_dict(), folder / "encoder" / "model.safetensors")
    (folder / "encoder" / "config.json").write_text(json.dumps({"architecture": "test_efficientnet"}))
    return ["--language", str(folder / "lm"), "--vision", f"timm:{folder / 'encoder'}"]


@pytest.mark.parametrize("beams", [1, 2])
def test_both_sides_say_the_same_and_ours_encodes_each_picture_once(folders, beams):
    options = evaluation.arguments([*folders, *SMALL, "--beams", str(beams), "--max-new-tokens", "4"])
    theirs, ours = evaluation.load(options)
    # Theirs ends at <|endofchunk|> only, and may write <image>.
    ours.model.generation_config.eos_token_id = None
    theirs.model.lang_encoder.generation_config.suppress_tokens = [ours.model.config.image_token_id]
    pixels = {"theirs": 0, "ours": 0}
    for name, encoder in (("theirs", theirs.model.vision_encoder), ("ours", ours.model.vision_encoder)):
        encoder.register_forward_hook(
            lambda module, args, out, name=name: pixels.update({name: pixels[name] + len(args[0])})
        )
    names, texts = [], set()
    for case in evaluation.cases(options):
        pixels.update(theirs=0, ours=0)
        said, found = theirs.answer(case.prompts), ours.answer(case.prompts)
        assert [text.strip() for text in said] == [text.strip() for text in found]
        texts |= set(said)
        shown = [image for p in case.prompts for image in (*p.prefix_images, *p.images)]
        assert pixels == {"theirs": len(shown) * beams, "ours": len(set(shown))}
        names.append(case.name)
    assert names == ["0 shots", "3 shots, random", "3 shots, fixed"]
    assert len(texts) > 1


def test_it_prints_a_line_for_each_case_and_a_table(folders, capsys):
    evaluation.main([*folders, *SMALL])
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["case"] for row in rows] == ["0 shots", "3 shots, random", "3 shots, fixed"]
    assert [row["queries"] for row in rows] == [[6, 6], [4, 3], [6, 3]]
    assert all(row["ours"] > 0 and row["theirs"] > 0 and row["times_as_fast"] > 0 for row in rows)
    assert all(row["same_answers"] == f"{row['queries'][1]} of {row['queries'][1]}" for row in rows)
    assert "times as fast" in "\n".join(line for line in lines if not line.startswith("{"))


def test_a_pool_that_is_too_small_is_refused(capsys):
    with pytest.raises(SystemExit):
        evaluation.arguments(["--pool", "32"])
    assert "--pool 32: must be more than the most shots, 32" in capsys.readouterr().err
