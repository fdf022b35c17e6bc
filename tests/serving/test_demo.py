"""What the demo page does with prompts, limits and looks; no browser, no server."""

from __future__ import annotations

import io
import json
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.looking import LookingWord
from flamingo.serving.demo import markup
from flamingo.serving.demo.asking import Asking, Update
from flamingo.serving.demo.examples import card, examples
from flamingo.serving.demo.limits import Limits, check_files
from flamingo.serving.demo.overlay import DIMMED, overlay, seen_box
from flamingo.serving.demo.server import Place, closed
from flamingo.serving.demo.turns import Turn, arranged, prompt_of
from flamingo.serving.engine import Engine
from flamingo.serving.prompt import Sampling
from tests.eval.harness_model import write_model

RED, BLUE = (Image.new("RGB", (64, 48), name) for name in ("red", "blue"))
ASKED = "Question: what color? Answer:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def asking(folder: Path) -> Asking:
    return Asking(Engine(folder), Limits(max_pictures=3, max_characters=500, max_new_tokens=300))


def huge_png(side: int = 30_000) -> bytes:
    """A PNG of one colour, whole and valid, one bit a pixel: some 100 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# -- the prompt ------------------------------------------------------------------------------


def test_rows_become_the_prompt_of_training() -> None:
    turns = [Turn(f" {ASKED} ", RED, "red"), Turn(), Turn(f"{ASKED} ", BLUE)]
    prompt = prompt_of(turns, Limits())
    assert prompt.text == f"<image>{ASKED} red<|endofchunk|><image>{ASKED}"
    assert prompt.pictures == (RED, BLUE)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "the question is empty"),
        ([Turn(ASKED, RED, "red"), Turn("  ")], "the question is empty"),
        ([Turn("a" * 4001)], "4001 characters: this page allows 4000"),
        ([Turn("a", RED)] * 7, "7 pictures: this page allows at most 6"),
        ([Turn("a <image> b")], "add the picture instead"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named(turns: list[Turn], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prompt_of(turns, Limits())


def test_rows_are_added_moved_and_removed() -> None:
    rows = ["a", "b", "c", ""]
    assert arranged(rows, 3, "up", 1, "") == (["b", "a", "c", ""], 3)
    assert arranged(rows, 3, "down", 1, "") == (["a", "c", "b", ""], 3)
    assert arranged(rows, 3, "remove", 0, "") == (["b", "c", "", ""], 2)
    assert arranged(rows, 3, "add", 0, "") == (rows, 4)
    for action, index, shown in (("up", 0, 3), ("down", 2, 3), ("add", 0, 4), ("remove", 3, 3)):
        assert arranged(rows, shown, action, index, "") == (rows, shown)


def test_examples_are_prompts_within_the_limits() -> None:
    assert any(len(example.turns) > 1 for example in examples(6))
    assert all(len(example.turns) == 1 for example in examples(1))
    for example in examples(6):
        prompt = prompt_of(example.turns, Limits())
        assert prompt.text.endswith("Answer:") and len(prompt.pictures) == len(example.turns)
        assert card(example).size == card(examples(6)[0]).size


# -- limits ----------------------------------------------------------------------------------


def test_a_huge_png_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(huge_png())
    tracemalloc.start()
    with pytest.raises(ValueError, match="too large.* at most 40 million pixels"):
        Limits().read_picture(tmp_path / "huge.png", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_only_pictures_among_the_uploads_are_read(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    BLUE.save(tmp_path / "secret.png")
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    (uploads / "text.png").write_text("no picture")
    buffer = io.BytesIO()
    RED.save(buffer, "png")
    (uploads / "red.png").write_bytes(buffer.getvalue())
    limits = Limits(max_megabytes=1)
    assert limits.read_picture(uploads / "red.png", uploads).getpixel((0, 0)) == (255, 0, 0)
    (uploads / "big.png").write_bytes(buffer.getvalue() + bytes(1_000_000))
    for path, said in (
        (tmp_path / "secret.png", "only uploaded"),
        (uploads / ".." / "secret.png", "only uploaded"),
        (uploads / "link.png", "only uploaded"),
        (uploads / "text.png", "no picture that can be read"),
        (uploads / "big.png", "1.0 MB: this page takes pictures of at most 1 MB"),
        (uploads / "gone.png", "not here any more"),
    ):
        with pytest.raises(ValueError, match=said):
            limits.read_picture(path, uploads)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://localhost/x.png", "uploads/../x", 3, ["a"], None, "a\0b"]
)
def test_a_request_that_names_a_file_which_was_not_uploaded_is_refused(path: object, tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    check_files([1, None, {"path": str(uploads / "abc" / "x.png"), "url": "http://here/x.png"}], uploads)
    with pytest.raises(ValueError, match="only uploaded pictures"):
        check_files(["text", [{"value": {"path": path, "meta": {"_type": "gradio.FileData"}}}]], uploads)


def test_limits_hold_for_settings(asking: Asking) -> None:
    for settings, said in (
        ({"max_new_tokens": 301}, "max_new_tokens=301: this page allows at most 300"),
        ({"num_beams": 9}, "num_beams=9"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": None}, "NoneType"),
    ):
        (update,) = asking.ask([Turn(ASKED, RED)], settings, "s")
        assert update.error and said in update.status
    with pytest.raises(ValueError, match="max_pictures=0"):
        Limits(max_pictures=0)


# -- asking and looking ----------------------------------------------------------------------


def asked(asking: Asking, *turns: Turn, **settings: object) -> list[Update]:
    asking.begin("s")
    return list(asking.ask(turns, settings, "s"))


def test_an_answer_grows_and_ends_with_words_that_can_be_clicked(asking: Asking) -> None:
    *growing, last = asked(asking, Turn(ASKED, RED, "red"), Turn(ASKED, BLUE), max_new_tokens=6)
    assert len(growing) >= 6 and all(update.told is None for update in growing)
    assert last.told is not None and not last.error
    prompt = prompt_of([Turn(ASKED, RED, "red"), Turn(ASKED, BLUE)], asking.limits)
    answer = asking.engine.answer(prompt, Sampling(max_new_tokens=6))
    looked = asking.engine.looks(prompt, answer.ids)
    assert last.text == answer.text and [w.word for w in last.told.words] == [w.word for w in looked]
    html = asking.look(last.told, len(last.told.words) - 1)
    assert html.count("<figure") == 2 and html.count("not seen by this word") == 1
    assert "sees only the last picture" in html and "centred square" in html
    for number in (-1, len(last.told.words)):
        with pytest.raises(ValueError, match="ask again"):
            asking.look(last.told, number)


def test_a_stopped_answer_keeps_what_was_said_and_the_next_is_whole(asking: Asking) -> None:
    asking.begin("s")
    updates = asking.ask([Turn(ASKED, RED)], {"max_new_tokens": 300, "repetition_penalty": 1.5}, "s")
    next(updates)
    asking.stop("other")
    next(updates)
    asking.stop("s")
    *_, last = updates
    assert "stopped after" in last.status and last.told is not None and last.told.words
    assert "stopped" not in asked(asking, Turn(ASKED, RED), max_new_tokens=2)[-1].status
    asking.begin("s")
    asking.stop("s")  # while it waits
    (last,) = asking.ask([Turn(ASKED, RED)], {"max_new_tokens": 300}, "s")
    assert last.text == "" and "stopped after 0" in last.status


def test_without_pictures_there_is_nothing_to_look_at(asking: Asking) -> None:
    last = asked(asking, Turn("a b"), max_new_tokens=4)[-1]
    assert last.told and "no picture" in asking.look(last.told, 0)


def test_what_people_write_is_never_markup() -> None:
    bad = "<script>alert(1)</script>"
    word = LookingWord(bad, torch.full((1, 2, 2), 0.25))
    for html in (
        markup.status_html(bad, True),
        markup.picture_html(None, bad),
        markup.looks_html(word, [RED], "center", 3.0, False),
    ):
        assert "<script" not in html and "&lt;script" in html


def test_an_overlay_lies_where_the_encoder_sees(asking: Asking) -> None:
    assert seen_box((64, 48), "center") == (8, 0, 56, 48)
    assert seen_box((64, 48), "pad") == (0, -8, 64, 56)
    assert seen_box((64, 48), "squash") == (0, 0, 64, 48)
    grid = np.array([[1, 0], [0, 0]], np.float32)
    white = Image.new("RGB", (64, 48), "white")
    drawn = {crop: np.asarray(overlay(white, grid, crop, 4.0)) for crop in ("center", "pad", "squash")}
    outside = round(255 * (DIMMED + (1 - DIMMED) / 2))
    assert (drawn["center"][:, :8] == outside).all() and (drawn["center"][:, 56:] == outside).all()
    for pixels in drawn.values():
        assert pixels[4, 12].sum() > 2 * pixels[44, 50].sum()  # light where it looked, dark where not
    assert not (drawn["squash"] == outside).all(-1).any() and not (drawn["pad"] == outside).all(-1).any()


def test_a_picture_of_one_row_is_drawn(asking: Asking) -> None:
    for crop in ("center", "pad", "squash"):
        assert overlay(Image.new("RGB", (384, 1)), np.ones((2, 2), np.float32), crop, 3.0).size == (384, 1)


# -- the command -----------------------------------------------------------------------------


def test_a_folder_without_a_model_of_ours_is_one_line(tmp_path: Path) -> None:
    for config, said in (
        (None, "holds no model"),
        ("{}", "no model's"),
        ('{"model_type": "llama"}', "'llama'"),
    ):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        result = CliRunner().invoke(app, ["demo", str(tmp_path)])
        assert result.exit_code == 1 and said in result.output and result.output.count("\n") == 1


def test_a_port_in_use_is_one_line(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["demo", str(folder), "--port", str(port)])
    assert result.exit_code == 1 and f"127.0.0.1:{port} cannot be used" in result.output
    with pytest.raises(ValueError, match="--host"):
        Place("203.0.113.1").check()


def test_without_gradio_the_command_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flamingo.serving.demo.start.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo", str(folder)])
    assert result.exit_code == 1 and "pip install 'flamingo-vlm[demo]'" in result.output


def test_the_command_line_does_not_load_the_page() -> None:
    code = "import sys, flamingo.cli; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_the_page_does_not_need_is_closed() -> None:
    for path in ("/gradio_api/proxy=http://x", "/proxy=x", "/gradio_api/info", "/monitoring/a/summary"):
        assert closed(path)
    for path in ("/", "/gradio_api/queue/join", "/gradio_api/upload", "/assets/info.js", "/config"):
        assert not closed(path)


def test_the_benchmark_times_the_first_token_of_every_question(folder: Path, monkeypatch, capsys) -> None:
    from benchmarks import demo

    monkeypatch.setattr("sys.argv", ["demo", str(folder), "--questions", "2", "--examples", "0", "1"])
    demo.main()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["examples"], row["questions"]) for row in told] == [(0, 2), (1, 2)]
    for row in told:
        assert (
            0 < row["first_token"] <= row["slowest"]
            and row["first_token"] <= row["whole_answer_with_its_looks"]
        )
