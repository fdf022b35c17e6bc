"""Native in transformers: Auto classes, pipelines, chats."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

import flamingo
from flamingo import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
IMAGE, END = "<image>", "<|endofchunk|>"


@pytest.fixture
def processor(model, seeing_tokenizer) -> FlamingoProcessor:
    return FlamingoProcessor.for_model(model.config, seeing_tokenizer)


@pytest.fixture
def folder(model, processor, tmp_path) -> Path:
    """Model and processor, saved together."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def red() -> Image.Image:
    return Image.new("RGB", (40, 30), "red")


def turn(role: str, *parts) -> dict:
    """A message of a chat: strings are text, everything else a picture."""
    texts = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts
    ]
    return {"role": role, "content": texts}


# -- registration ------------------------------------------------------------------------


def test_the_auto_classes_load_a_folder(folder):
    assert type(AutoConfig.from_pretrained(folder)) is FlamingoConfig
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is FlamingoForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder)) is FlamingoProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is flamingo.FlamingoImageProcessor


def test_importing_flamingo_is_all_that_another_process_needs(folder):
    code = (
        "import flamingo\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"AutoProcessor.from_pretrained({str(folder)!r})\n"
        f"print(type(AutoModelForImageTextToText.from_pretrained({str(folder)!r})).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout.split() == ["FlamingoForConditionalGeneration"], done.stderr


def test_a_command_starts_without_the_libraries():
    """`python -m flamingo.cli` as a process: nothing heavy is imported before there is something to do."""
    code = (
        "import runpy, sys\n"
        "sys.argv, sys.orig_argv = ['-m', '--help'], ['python', '-m', 'flamingo.cli', '--help']\n"
        "try: runpy.run_module('flamingo.cli', run_name='__main__')\n"
        "finally: print(*{'torch', 'transformers'} & set(sys.modules), 'end')\n"  # alone in its line
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "end", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("/x/bin/flamingo", "python /x/bin/flamingo train", True),
        ("-m", "python -u -m flamingo.train r.yaml", True),
        ("-m", "python -m pytest -m flamingo", False),
        ("-c", "python -c ...", False),
        ("run.py", "python run.py -m flamingo", False),
        ("", "python", False),
    ],
)
def test_which_processes_are_commands(script, words, expected):
    assert flamingo._is_command(script, words.split()) is expected


# -- pipelines ---------------------------------------------------------------------------


def test_the_pipeline_takes_chats(model, processor, folder, red):
    pipe = pipeline("image-text-to-text", model=str(folder))
    chat = [turn("user", red, "a b"), turn("assistant", "c"), turn("user", red, "a")]
    (made,) = pipe(text=chat, max_new_tokens=3, return_full_text=False)
    batch = processor(text=f"{IMAGE}a b c{END}{IMAGE}a", images=[red, red])
    out = model.generate(**batch, max_new_tokens=3)
    assert made["generated_text"] == processor.decode(out[0], skip_special_tokens=True)[len("a b c a") :]
    both = pipe(text=[chat, chat[:1]], max_new_tokens=3, return_full_text=False)
    assert both[0][0]["generated_text"] == made["generated_text"] and both[1][0]["generated_text"]
    answered = pipe(text=chat[:2], max_new_tokens=1)[0]["generated_text"][-1]  # goes on with the answer
    assert answered["content"][0]["text"].startswith("c")


def test_the_pipeline_takes_images_and_text(folder, red):
    pipe = pipeline("image-text-to-text", model=str(folder))
    (one,) = pipe(red, text=f"{IMAGE} a", max_new_tokens=2)
    several = pipe([red, red], text=[f"{IMAGE} a", f"{IMAGE} a b"], max_new_tokens=2)
    assert one["generated_text"].startswith(f"{IMAGE} a") and len(several) == 2
    assert several[0]["generated_text"] == one["generated_text"]


# -- chats -------------------------------------------------------------------------------


def chat_batch(processor, chat, **options):
    return processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )


def test_a_chat_becomes_text_with_pictures_where_they_stand(processor, red, tmp_path):
    red.save(tmp_path / "red.png")
    chat = [turn("user", "a", red, "b"), turn("assistant", "c"), turn("user", tmp_path / "red.png", "d")]
    assert processor.apply_chat_template(chat) == f"a{IMAGE}b c{END}{IMAGE}d"
    chat[2]["content"][0] = {"type": "image", "path": str(tmp_path / "red.png")}
    found = chat_batch(processor, chat)
    expected = processor(text=f"a{IMAGE}b c{END}{IMAGE}d", images=[red, red])
    assert sorted(found) == sorted(expected) == ["attention_mask", "input_ids", "pixel_values"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_chats_of_a_batch_may_differ_in_pictures(processor, red):
    chats = [[turn("user", red, red, "a")], [turn("user", "b c d e")]]
    found = chat_batch(processor, chats)
    expected = processor(text=[f"{IMAGE}{IMAGE}a", "b c d e"], images=[red, red])
    assert torch.equal(found["input_ids"], expected["input_ids"]) and len(found["pixel_values"]) == 2


def test_content_may_be_a_string_and_an_image_may_come_as_base64(processor, red, tmp_path):
    import base64

    red.save(tmp_path / "red.png")
    code = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    chat = [{"role": "user", "content": [{"type": "image", "base64": code}]}]
    assert torch.equal(
        chat_batch(processor, chat)["pixel_values"], processor(text=IMAGE, images=red)["pixel_values"]
    )
    text = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert processor.apply_chat_template(text) == "a b"
    assert "pixel_values" not in chat_batch(processor, text)


def test_what_the_assistant_says_can_be_told_from_the_rest(processor, red):
    chats = [[turn("user", red, "a"), turn("assistant", "b c")], [turn("assistant", "b"), turn("user", "d")]]
    found = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = torch.tensor(found["assistant_masks"]).bool()
    assert processor.batch_decode(
        [row[mask] for row, mask in zip(found["input_ids"], said, strict=True)]
    ) == [
        f"b c {END}",
        f"b {END}",
    ]


def test_the_lms_own_template_gets_the_pictures_in_its_text(model, seeing_tokenizer, red, tmp_path):
    own = (
        "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
        "{% if add_generation_prompt %} q{% endif %}"
    )
    seeing_tokenizer.chat_template = own
    processor = FlamingoProcessor.for_model(model.config, seeing_tokenizer)
    chat = [turn("user", red, " a")]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == f"<s> {IMAGE} a </s> q"
    assert chat_batch(processor, chat)["pixel_values"].shape[0] == 1
    processor.save_pretrained(tmp_path)
    assert FlamingoProcessor.from_pretrained(tmp_path).apply_chat_template(chat) == f"<s> {IMAGE} a </s>"


def test_the_template_can_be_overridden_once_or_for_good(processor, red, tmp_path):
    other = (
        "{% for m in messages %}{% for p in m['content'] %}"
        "{{ '<image> q' if p['type'] == 'image' else p['text'] }}"
        "{% endfor %}{% endfor %}"
    )
    chat = [turn("user", red, " a")]
    assert processor.apply_chat_template(chat, chat_template=other) == f"{IMAGE} q a"
    processor.chat_template = other
    processor.save_pretrained(tmp_path)
    back = AutoProcessor.from_pretrained(tmp_path)
    assert back.apply_chat_template(chat) == f"{IMAGE} q a"
    assert len(chat_batch(back, chat)["pixel_values"]) == 1


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image"}, "names 0 pictures"),
        ({"type": "video", "video": "x.mp4"}, "part of type 'video'"),
        ({"type": "image", "image": Image.new("RGB", (0, 3))}, "0 x 3 pixels"),
    ],
)
def test_parts_that_cannot_be_read_are_refused(processor, part, words):
    with pytest.raises(ValueError, match=words):
        chat_batch(processor, [{"role": "user", "content": [part]}])


# -- the processor -----------------------------------------------------------------------


def test_images_may_come_row_by_row_and_are_counted_so(processor, red):
    rows = [f"{IMAGE} a", f"{IMAGE} b {IMAGE}"]
    nested, flat = (processor(text=rows, images=i) for i in ([[red], [red, red]], [red] * 3))
    assert all(torch.equal(nested[name], flat[name]) for name in flat)
    with pytest.raises(ValueError, match="row 0: 1 <image> in the text but 2 pictures"):
        processor(text=rows, images=[[red, red], [red]])
    with pytest.raises(ValueError, match="one list per row"):
        processor(text=rows, images=[[red, red, red]])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"images": None}, "text is missing"),
        ({"text": "a", "videos": ["x.mp4"]}, "videos"),
        ({"text": "a", "return_tensors": "np"}, "return_tensors"),
    ],
)
def test_what_a_flamingo_cannot_take_is_refused(processor, given, words):
    with pytest.raises(ValueError, match=words):
        processor(**given)


def test_truncation_may_not_cut_pictures_off(processor, red):
    given = {"text": f"a b {IMAGE}", "images": [red], "truncation": True}
    assert processor(**given, max_length=3)["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="1 pictures but 0 <image> left after truncation"):
        processor(**given, max_length=2)


def test_ids_become_text_again(processor):
    ids = processor(text=[f"a b {END}", "c"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a b", "c"]
    assert processor.decode(ids[0]) == f"a b {END}"


# -- the documentation -------------------------------------------------------------------


def test_the_snippets_of_the_documentation_run(folder, red, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) >= 8
    red.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for snippet in snippets:
        wanted = [w for w in ("peft", "torchao", "accelerate") if f"from {w}" in snippet]
        if all(importlib.util.find_spec(library) for library in wanted):
            exec(snippet.replace("runs/quickstart/model", str(folder)), names)
    assert names["output"].shape[0] == 2 and (tmp_path / "runs").exists()
