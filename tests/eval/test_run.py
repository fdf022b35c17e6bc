"""An evaluation asks each query exactly once, however often it is stopped and by how many processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from flamingo.eval.benchmarks import Example, File
from flamingo.eval.config import EvalConfig, explained
from flamingo.eval.few_shot import Setting
from flamingo.eval.run import Part, answer_files, check_complete, read_answers
from flamingo.eval.session import Plan
from flamingo.eval.task import Task, checked

NAME = "some_package.pets"
QUERIES = 23


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark outside of the package: cats and dogs, what the picture is says its name."""
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "dog.png")

    def examples(folder, split):
        pets = [("cat", "dog")[i % 2] for i in range(QUERIES)]
        return [
            Example(f"{split}{i}", tmp_path / f"{pet}.png", f"what is {i}?", (pet,), pet)
            for i, pet in enumerate(pets)
        ]

    made = SimpleNamespace(
        TITLE="Pets",
        DESCRIPTION="cats and dogs",
        LICENCE="none",
        SOURCE="nowhere",
        FILES={"train": (File("pets.json", "nowhere"),), "test": ()},
        BUNDLED=True,
        QUERIES="test",
        DEMONSTRATIONS="train",
        METRICS=("exact_match",),
        MAX_NEW_TOKENS=3,
        BLIND=None,
        CLASSES=lambda folder: (" cat", " dog"),
        examples=examples,
        prompt=lambda e: f"{e.question} It is a",
        completion=lambda e: f" {e.answers[0]}",
        tidy=lambda text: text.strip().lower(),
    )
    module = ModuleType(NAME)
    vars(module).update(vars(made))
    monkeypatch.setitem(sys.modules, "some_package", ModuleType("some_package"))
    monkeypatch.setitem(sys.modules, NAME, module)
    return module


class Seer:
    """In place of a model: names the pet in the picture; of a blank one, says cat."""

    def __init__(self, stop_after: int | None = None):
        self.left, self.asked = stop_after, []

    def predict(self, prompts):
        for prompt in sorted(prompts, key=lambda p: len(p.text)):
            if self.left is not None and self.left == 0:
                raise KeyboardInterrupt
            self.left = self.left and self.left - 1
            self.asked.append(prompt)
            yield prompt, self._pet(prompt) + " "

    def rank(self, prompts, classes):
        for prompt in prompts:
            self.asked.append(prompt)
            pet = self._pet(prompt)
            yield prompt, tuple(-0.5 if pet in c else -3.0 for c in classes)

    @staticmethod
    def _pet(prompt) -> str:
        return prompt.images[0].stem if prompt.images[0] else "cat"


def part(out: Path, config: EvalConfig, seer: Seer, rank: int = 0, world: int = 1) -> Part:
    out.mkdir(exist_ok=True)
    return Part(Task.of(config), config, seer, out, rank, world, quiet=True)


def records(out: Path, setting: Setting) -> dict[str, dict]:
    found = read_answers(answer_files(out, setting))
    assert len(found) == len({record["id"] for record in found})
    return {record["id"]: record for record in found}


def test_answers_do_not_depend_on_the_number_of_processes(benchmark, tmp_path):
    config = EvalConfig(benchmark=NAME, shots=(0, 2), control_limit=5)
    for world in (1, 2, 3):
        for rank in range(world):
            for setting in config.settings():
                part(tmp_path / str(world), config, Seer(), rank, world).run(setting)
    for setting in config.settings():
        one, two, three = (records(tmp_path / str(world), setting) for world in (1, 2, 3))
        assert one == two == three
        task = Task.of(config)
        assert len(check_complete(benchmark, tmp_path / "2", setting, task.queries)) == len(one)


def test_a_stopped_evaluation_asks_only_what_is_missing(benchmark, tmp_path):
    config = EvalConfig(benchmark=NAME, shots=(2,), control_limit=0)
    (setting,) = config.settings()
    with pytest.raises(KeyboardInterrupt):
        part(tmp_path / "a", config, Seer(stop_after=9)).run(setting)
    assert len(records(tmp_path / "a", setting)) == 9
    file = answer_files(tmp_path / "a", setting)[0]
    file.write_text(file.read_text() + '{"id": "test2", "predic')  # killed within a line
    seers = [Seer(), Seer()]
    for rank, seer in enumerate(seers):  # by two processes now
        part(tmp_path / "a", config, seer, rank, 2).run(setting)
    assert sum(len(seer.asked) for seer in seers) == QUERIES - 9
    part(tmp_path / "b", config, Seer()).run(setting)
    assert records(tmp_path / "a", setting) == records(tmp_path / "b", setting)


def test_a_record_tells_what_was_asked_said_and_shown(benchmark, tmp_path):
    config = EvalConfig(benchmark=NAME, shots=(4,), control_limit=0)
    (setting,) = config.settings()
    part(tmp_path / "a", config, Seer()).run(setting)
    record = records(tmp_path / "a", setting)["test1"]
    assert record["prediction"] == "dog" and record["raw"] == "dog " and record["score"] == 1.0
    assert record["answers"] == ["dog"] and record["kind"] == "dog" and len(record["shots"]) == 4
    assert {shot["answer"] for shot in record["shots"]} == {"cat"}  # dogs share the query's picture


def test_an_incomplete_setting_is_named(benchmark, tmp_path):
    config = EvalConfig(benchmark=NAME, shots=(0,), control_limit=0)
    (setting,) = config.settings()
    part(tmp_path / "a", config, Seer(), 0, 2).run(setting)
    with pytest.raises(ValueError, match="11 answers to 11 questions of Pets, 23 were asked"):
        check_complete(benchmark, tmp_path / "a", setting, Task.of(config).queries)


def test_classes_are_ranked_and_calibrated_by_a_blank_picture(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "MAX_NEW_TOKENS", 0)
    for calibrate in (False, True):
        config = EvalConfig(benchmark=NAME, shots=(0,), control_limit=0, calibrate=calibrate)
        (setting,) = config.settings()
        out = tmp_path / str(calibrate)
        part(out, config, Seer()).run(setting)
        found = records(out, setting)
        assert found["test1"]["prediction"] == "dog"
        # A blank picture says cat by 2.5, so that a cat is no surprise and a dog is twice one.
        assert found["test1"]["scores"] == ([-2.5, 2.5] if calibrate else [-3.0, -0.5])
        assert found["test0"]["scores"] == ([0.0, 0.0] if calibrate else [-0.5, -3.0])


def test_an_ensemble_asks_in_several_orders_and_answers_once(benchmark, tmp_path):
    config = EvalConfig(benchmark=NAME, shots=(4,), control_limit=0, ensemble=3)
    (setting,) = config.settings()
    seer = Seer()
    part(tmp_path / "a", config, seer).run(setting)
    assert len(seer.asked) == 3 * QUERIES and len(records(tmp_path / "a", setting)) == QUERIES
    mine = [p.prefix for p in seer.asked if p.example.id == "test3"]
    assert len(set(mine)) > 1 and len({"".join(sorted(prefix)) for prefix in mine}) == 1


def test_answers_to_other_settings_are_not_mixed(tmp_path):
    one = Plan("m", "f", EvalConfig(benchmark="easy_vqa", shots=(0, 4)))
    one.claim(tmp_path)
    one.claim(tmp_path)
    assert Plan.read(tmp_path) == one
    other = Plan("m", "g", EvalConfig(benchmark="easy_vqa", shots=(0, 4), beams=1))
    with pytest.raises(ValueError, match="beams was 3, is 1; fingerprint was 'f', is 'g'"):
        other.claim(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["fingerprint"] == "f"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split": "val"}, "no split 'val': choose one of train, test"),
        ({"shots": (30,)}, "shots=30: Pets has only 23 demonstrations in train"),
        ({"shots": (4,), "pool": 3}, r"only 3 demonstrations in train \(pool=3\)"),
    ],
)
def test_data_that_cannot_be_asked_is_refused(benchmark, fields, said):
    with pytest.raises(ValueError, match=said):
        Task.of(EvalConfig(benchmark=NAME, **fields))


def test_data_that_is_not_there_is_named(benchmark, tmp_path, monkeypatch):
    pets = benchmark.examples(None, "test")
    with pytest.raises(ValueError, match="1 ids come more than once, the first is 'test3'"):
        checked([*pets, pets[3]], "Pets, test")
    (tmp_path / "dog.png").unlink()
    with pytest.raises(ValueError, match="1 of 2 pictures are missing, the first is .*dog.png"):
        Task.of(EvalConfig(benchmark=NAME))
    monkeypatch.delattr(benchmark, "BUNDLED")
    with pytest.raises(ValueError, match="needs its data: --data FOLDER"):
        Task.of(EvalConfig(benchmark=NAME))


def test_an_unknown_benchmark_or_setting_is_named_with_what_there_is(benchmark, monkeypatch):
    import pydantic

    with pytest.raises(ValueError, match="'nothing': choose one of .*easy_vqa"):
        Task.of(EvalConfig(benchmark="nothing"))
    monkeypatch.delattr(benchmark, "tidy")
    with pytest.raises(ValueError, match="lacks tidy"):
        Task.of(EvalConfig(benchmark=NAME))
    with pytest.raises(pydantic.ValidationError) as error:
        EvalConfig(benchmark="easy_vqa", shot=(3,), beams=0)  # type: ignore[call-arg]
    assert "did you mean 'shots'?" in explained(error.value) and "beams=0" in explained(error.value)
