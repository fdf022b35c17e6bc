"""show and stats: what a person sees of the data is what the model gets."""

from __future__ import annotations

import html
import json
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.data.config import SourceConfig
from flamingo.data.kinds._members import example_png as png
from flamingo.data.tools.executors import Executor
from flamingo.data.tools.show import _seen, show
from flamingo.data.tools.stats import picture, stats, write
from flamingo.media import sight


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def page(*items: dict) -> dict[str, bytes]:
    return {"json": json.dumps({"items": items}).encode(), "0.png": png("red"), "1.png": png("blue")}


@pytest.fixture
def shard(write_tar) -> Path:
    first = page(
        {"text": "before "},
        {"image": "0.png"},
        {"text": "<script>alert(1)</script>", "loss": False},
        {"image": "1.png"},
        {"text": "learned"},
    )
    return write_tar("<b>.tar", {"000": first})


def pieces(text: str) -> list[tuple[str, str]]:
    """(class, text) of every piece of the page, in order."""
    found = re.findall(r'<span class="piece([^"]*)">([^<]*)</span>', text.split("</p>", 1)[1])
    return [(classes.strip(), html.unescape(words)) for classes, words in found]


def test_the_page_shows_text_images_sight_and_loss_and_escapes_everything(shard, tmp_path):
    out = tmp_path / "page.html"
    run("show", shard, "--kind", "interleaved", "--out", out, "-n", 1, "--side", 16)
    text = out.read_text()
    assert pieces(text) == [("loss", "before "), ("i0", "<script>alert(1)</script>"), ("loss i1", "learned")]
    assert "<script" not in text
    assert "<b>" not in text
    assert text.count("data:image/jpeg;base64,") == 2
    assert text.index('alt="image 1"') < text.index("alert(1)") < text.index('alt="image 2"')
    assert "http" not in text.replace("http-equiv", "")


def test_words_that_look_ahead_have_the_colour_of_the_next_image(shard, tmp_path):
    out = tmp_path / "page.html"
    run("show", shard, "--kind", "interleaved", "--out", out, "-n", 1, "--p-next", 1)
    assert [classes for classes, _ in pieces(out.read_text())] == ["loss i0", "i1", "loss"]


def test_what_each_token_sees_is_what_the_model_lets_it_see():
    random = torch.Generator().manual_seed(0)
    for _ in range(30):
        is_image = torch.rand(12, generator=random) < 0.3
        ids = torch.where(is_image, 9, 1)[None]
        for ahead in (False, True):
            seen, _ = sight(ids, 9, "previous", None, torch.full_like(ids, ahead, dtype=torch.bool))
            expected = [int(n) if 0 <= int(n) < int(is_image.sum()) else None for n in seen[0]]
            assert _seen(is_image.tolist(), ahead) == expected


def test_documents_that_are_cut_say_by_how_much(shard, tmp_path):
    source = SourceConfig(name="s", kind="interleaved", shards=str(shard), batch=1, max_tokens=10)
    tokens = show(source, tmp_path / "page.html", documents=2, side=8)
    text = (tmp_path / "page.html").read_text()
    assert tokens == 16  # "before " and its end, twice
    assert text.count("more tokens are cut off") == 2


def test_a_bad_sample_is_named_where_another_stands_for_it(write_tar, tmp_path):
    good = page({"image": "0.png"}, {"text": "fine"})
    path = write_tar("s.tar", {"000": good, "001": {"json": b"{}"}})
    run("show", path, "--kind", "interleaved", "--out", tmp_path / "page.html", "-n", 2)
    assert "stands for the bad sample shards/s.tar/001: bad json" in (tmp_path / "page.html").read_text()


def test_stats_count_what_is_there(write_tar, tmp_path):
    documents = {f"{n}": page({"image": "0.png"}, {"text": "ab" * (n + 1)}) for n in range(4)}
    documents["4"] = page({"image": "0.png"}, {"image": "1.png"}, {"text": "x"})
    documents["5"] = {"json": b"[]"}
    for name, keys in (("a.tar", "012"), ("b.tar", "345")):
        write_tar(name, {key: documents[key] for key in keys})
    found, outcome = stats([str(tmp_path / "*.tar")], "interleaved", executor=Executor(workers=1))
    assert not outcome.failures
    expected = {"samples": 5, "bad_samples": 1, "images": 6, "clips": 0, "length": 21, "unit": "characters"}
    assert {name: found[name] for name in expected} == expected
    assert found["faults"] == {"bad json": 1}
    assert found["histograms"]["images_per_document"] == [(1, 4), (2, 1)]
    assert found["summary"]["length"] == {"mean": 4.2, "min": 1, "max": 8, "median": 4, "p95": 8}
    assert found["histograms"]["shorter_side"] == [(0, 6)]
    report, picture = write(found, tmp_path / "out")
    assert json.loads(report.read_text())["samples"] == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_shard_without_samples_among_others_counts_as_none(write_tar, tmp_path):
    write_tar("a.tar", {"0": page({"image": "0.png"}, {"text": "ab"})})
    write_tar("b.tar", {})
    found, outcome = stats([str(tmp_path / "*.tar")], "interleaved", executor=Executor(workers=1))
    assert not outcome.failures
    assert (found["shards"], found["samples"]) == (2, 1)


def test_the_picture_counts_images_in_whole_numbers(write_tar, tmp_path):
    write_tar("a.tar", {f"{n}": page(*[{"image": "0.png"}] * n, {"text": "x"}) for n in (3, 4)})
    found, _ = stats([str(tmp_path / "a.tar")], "interleaved", executor=Executor(workers=1))
    drawn = picture(found)
    drawn.canvas.draw()
    axes = drawn.axes[list(found["histograms"]).index("images_per_document")]
    assert len(axes.get_xticks()) > 1
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_stats_count_tokens_with_the_tokenizer_that_is_named(shard, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "words")
    out = tmp_path / "out"
    said = run("stats", shard, "--kind", "interleaved", "--tokenizer", tmp_path / "words", "--out", out,
               "--workers", 1)  # fmt: skip
    assert "1 samples (0 bad), 2 images, 0 clips, 3 tokens" in said
    assert "--tokenizer" in run("stats", shard, "--tokenizer", "/nowhere", "--out", out, status=1)


@pytest.mark.parametrize("command", ["pack", "index", "verify", "stats", "show", "features"])
def test_every_command_explains_its_options(command):
    text = run(command, "--help")
    assert len(list(chain(re.findall("--[a-z-]+", text)))) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere/*.tar"], "matches no file"),
        (["verify", "SHARD", "--kind", "pears"], "unknown kind 'pears'"),
        (["verify", "SHARD", "--kind", "mmc4", "--options", "{min_sides: 3}"], "option 'min_sides'"),
        (["stats", "SHARD", "--options", "7", "--out", "x"], "write names and values"),
        (["show", "SHARD", "--options", "{a: [}"], "--options"),
        (["index", "SHARD", "--part", "0/3"], "--part must be i/n"),
        (["show", "SHARD", "--kind", "pears"], "error: --kind pears: unknown kind 'pears'"),
        (["show", "SHARD", "--crop", "end"], "error: --crop end: Input should be 'start' or 'random'"),
        (["show", "SHARD", "--kind", "pairs"], "error: source 'shards': 16 bad samples in a row"),
    ],
)
def test_what_is_wrong_with_a_command_is_said_in_one_line(shard, arguments, message):
    said = run(*(str(shard) if a == "SHARD" else a for a in arguments), status=1)
    assert message in said.replace("\n", " ")
