"""`flamingo generate` of a file: checked, answered in batches, gone on with, put in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.serving.batch import Batcher
from flamingo.serving.engine import Engine
from flamingo.serving.job import Job, run_job
from flamingo.serving.journal import Journal
from flamingo.serving.pictures import Pictures
from flamingo.serving.prompt import Prompt, Sampling, open_picture
from flamingo.serving.requests import read_requests
from tests.eval.harness_model import picture, write_model

SAMPLING = Sampling(max_new_tokens=5)
ASKED = ("what color is the shape?", "a b a b a b a b what's this?", "yes no circle? red green blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, four pictures, and 24 prompts about them of many lengths."""
    folder = tmp_path_factory.mktemp("batch")
    write_model(folder / "model")
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    lines: list[dict[str, Any]] = []
    for number in range(24):
        text, name = ASKED[number % 3] + " a" * (number % 5), f"{number // 6}.png"
        if number % 4 == 3:
            content = [{"type": "image", "path": name}, {"type": "text", "text": text}]
            lines.append({"messages": [{"role": "user", "content": content}]})
        else:
            lines.append({"id": f"n{number}", "prompt": f"Question: {text} Answer:", "images": [name]})
    write(folder / "prompts.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> bytes:
    run_job(job(folder, folder / "unbroken.jsonl", batch_size=1))
    return (folder / "unbroken.jsonl").read_bytes()


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job(folder: Path, output: Path, **fields: Any) -> Job:
    given = {"input": folder / "prompts.jsonl", "sampling": SAMPLING, **fields}
    return Job(model=folder / "model", output=output, **given)


def command(folder: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", folder / "model", "--input", folder / "prompts.jsonl", "--output", output]
    return ["generate", *map(str, given), "--max-new-tokens", "5", *more]


def started(arguments: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "flamingo.cli", *arguments], env=env)


def test_answers_are_those_of_prompts_asked_alone_in_the_order_of_the_file(folder: Path, unbroken: bytes):
    records = [json.loads(line) for line in unbroken.splitlines()]
    requests = read_requests(folder / "prompts.jsonl", SAMPLING)
    assert [r["id"] for r in records] == [f"n{n}" if n % 4 < 3 else n + 1 for n in range(24)]
    engine = Engine(folder / "model")
    for request, record in list(zip(requests, records, strict=True))[:8]:
        text = request.prompt("few-shot", engine.processor)
        prompt = Prompt(text, tuple(map(open_picture, request.pictures)))
        alone = engine.answer(prompt, SAMPLING)
        assert record["answer"] == alone.text and record["new_tokens"] == len(alone.ids)
        assert record["prompt_tokens"] == engine.length(prompt)
    assert len({r["answer"] for r in records}) > 3  # or the order could not be seen


@pytest.mark.parametrize("size", [3, 16])
def test_answers_do_not_depend_on_the_batch_size(folder: Path, unbroken: bytes, tmp_path: Path, size: int):
    run_job(job(folder, tmp_path / "out.jsonl", batch_size=size))
    assert (tmp_path / "out.jsonl").read_bytes() == unbroken


def test_each_picture_is_encoded_once_and_those_kept_are_bounded(folder: Path, unbroken: bytes):
    engine = Engine(folder / "model")
    requests = read_requests(folder / "prompts.jsonl", SAMPLING)
    batcher = Batcher(engine, 4)
    assert sum(map(len, batcher.answers(requests))) == 24
    assert batcher.pictures.encoded == 4
    small = Pictures(engine.model, engine.processor.image_processor.transform, room=1)
    for _ in range(2):
        assert len(small.load([folder / "0.png", folder / "1.png"])) == 2
    assert small.encoded == 3 and len(small._kept) == 1  # the last one was still there


def test_a_number_of_processes_beside_a_launcher_is_refused(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = Job(folder / "model", folder / "prompts.jsonl", tmp_path / "out.jsonl", sampling=SAMPLING)
    with pytest.raises(ValueError, match="--processes 3, but a launcher started 2"):
        run_job(job, processes=3)


def test_two_processes_answer_as_one(folder: Path, unbroken: bytes, tmp_path: Path):
    process = started(command(folder, tmp_path / "out.jsonl", "--processes", "2"))
    assert process.wait(120) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == unbroken
    assert sorted(p.name for p in (tmp_path / "out.jsonl.run").glob("p*")) == ["plan.json"]


@pytest.mark.parametrize("lines", [1, 8])
def test_a_killed_run_goes_on_and_asks_nothing_twice(
    folder: Path, unbroken: bytes, tmp_path: Path, lines: int
):
    output = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.run" / "part-0.jsonl"
    process = started(command(folder, output, "--batch-size", "1"))
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < lines):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    if part.exists():
        with part.open("ab") as file:  # the line that was being written
            file.write(unbroken.splitlines()[-1][:20])
    before = len(Journal(output).answered())
    assert before >= lines
    outcome = run_job(job(folder, output))
    assert outcome is not None and outcome.asked == 24 - before
    assert output.read_bytes() == unbroken


def test_children_end_with_a_killed_parent(folder: Path, unbroken: bytes, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    process = started(command(folder, output, "--processes", "2", "--batch-size", "1"))
    while process.poll() is None and not list((tmp_path / "out.jsonl.run").glob("part-*.lock")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    run_job(job(folder, output))  # waits for their locks
    assert output.read_bytes() == unbroken


def test_a_finished_run_asks_nothing_more(folder: Path, tmp_path: Path):
    runner = CliRunner()
    assert runner.invoke(app, command(folder, tmp_path / "out.jsonl")).exit_code == 0
    again = runner.invoke(app, command(folder, tmp_path / "out.jsonl"))
    assert again.exit_code == 0 and "24 answers, none was missing" in again.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--max-new-tokens", "4"), "max_new_tokens was 5, is 4"),
        (("--set", "temperature=1"), "temperature was 0.0, is 1.0"),
        (("--style", "plain"), "style was 'few-shot', is 'plain'"),
    ],
)
def test_answers_to_something_else_are_refused(
    folder: Path, tmp_path: Path, change: tuple[str, str], said: str
):
    output = tmp_path / "out.jsonl"
    with Journal(output).claimed(job(folder, output).plan()):
        pass
    result = CliRunner().invoke(app, command(folder, output, *change))
    assert result.exit_code == 1 and said in result.output
    assert f"remove {output}.run and {output}" in result.output


def test_a_changed_input_and_a_foreign_output_are_refused(folder: Path, tmp_path: Path):
    lines = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    mine = job(folder, tmp_path / "out.jsonl", input=lines)
    run_job(mine)
    write(lines, [{"prompt": "b"}])
    with pytest.raises(ValueError, match="the input changed"):
        run_job(mine)
    with pytest.raises(ValueError, match="in.jsonl is the input too"):
        run_job(job(folder, lines, input=lines))
    write(tmp_path / "other.jsonl", [{"mine": 1}])
    with pytest.raises(ValueError, match="other.jsonl is there already"):
        run_job(job(folder, tmp_path / "other.jsonl", input=lines))


def test_damaged_pictures_and_long_prompts_are_errors_of_their_lines(folder: Path, tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    asked = [
        {"id": "bad", "prompt": "a", "images": ["bad.png"]},
        {"id": "good", "prompt": "a"},
        {"id": "long", "prompt": "a b " * 3000},
    ]
    lines = write(tmp_path / "in.jsonl", asked)
    arguments = ["--model", str(folder / "model"), "--input", str(lines)]
    result = CliRunner().invoke(app, ["generate", *arguments, "--output", str(tmp_path / "out.jsonl")])
    assert result.exit_code == 1 and "2 prompts have an error" in result.output
    bad, good, long = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "bad.png cannot be read" in bad["error"] and "answer" not in bad
    assert "answer" in good and "the prompt has" in long["error"]
    picture(1).save(tmp_path / "bad.png")
    outcome = run_job(Job(folder / "model", lines, tmp_path / "out.jsonl"))
    assert outcome is not None and outcome.asked == 2 and [r["id"] for r in outcome.errors] == ["long"]


def test_a_line_changes_its_sampling_and_a_seed_makes_its_answer_its_own(folder: Path, tmp_path: Path):
    drawn = {"prompt": "a b", "temperature": 2.0, "seed": 7, "max_new_tokens": 8}
    lines = write(tmp_path / "in.jsonl", [drawn, {"prompt": "a b c", "max_new_tokens": 2}, drawn])
    outcome = run_job(job(folder, tmp_path / "out.jsonl", input=lines))
    assert outcome is not None
    first, short, again = outcome.records
    assert first["answer"] == again["answer"] and short["new_tokens"] <= 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: no JSON"),
        ("[1]", "no JSON object"),
        ('{"promt": "a"}', "did you mean 'prompt'"),
        ('{"id": 1}', 'give "prompt" or "messages"'),
        ('{"prompt": "  "}', "empty"),
        ('{"prompt": "a", "images": ["no.png"]}', "no.png is not there"),
        ('{"prompt": "a", "images": ["http://a/b.png"]}', "is an address"),
        ('{"prompt": "<image><image>a", "images": ["0.png"]}', "2 <image> in the prompt but 1 images"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature='hot'"),
        ('{"prompt": "a", "temperature": -1}', "temperature=-1.0: must be"),
        ('{"prompt": "a", "id": 1.5}', "id"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', 'must end with one of role "user"'),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "role"),
        ('{"prompt": "a"}\n{"prompt": "b", "id": 1}', "line 2: id 1 is that of line 1 too"),
        ("\n", "holds no prompts"),
    ],
)
def test_lines_that_cannot_be_asked_are_named_before_the_start(tmp_path: Path, line: str, said: str):
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(ValueError) as caught:
        read_requests(tmp_path / "in.jsonl", Sampling())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --prompt or --input"),
        (["--prompt", "a", "--output", "b"], "--output goes with --input"),
        (["--input", "a", "--image", "b"], "--image goes with --prompt"),
        (["--input", "a"], "--output is missing"),
        (["--prompt", "a", "--set", "temprature=1"], "did you mean 'temperature'"),
        (["--input", "a", "--output", "b", "--style", "chatty"], "choose one of few-shot"),
    ],
)
def test_options_that_do_not_go_together_are_named(arguments: list[str], said: str):
    result = CliRunner().invoke(app, ["generate", "--model", "nowhere", *arguments])
    assert result.exit_code == 1 and said in result.output
