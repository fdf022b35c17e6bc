"""VQAv2, OK-VQA, TextVQA, VizWiz-VQA and GQA, read from tiny copies of their official files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flamingo.eval import benchmarks, metrics
from flamingo.eval.benchmarks import Prediction
from flamingo.eval.benchmarks._describe import describe
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Prompt, Setting, build, choose_shots
from flamingo.eval.run import Part, answer_files, read_answers
from flamingo.eval.task import Task
from tests.eval import fixtures_vqa
from tests.eval.fixtures_vqa import WRITERS

UNANSWERED = {"vqav2": ("test-dev", "test"), "textvqa": ("test",), "vizwiz": ("test",)}
UNANSWERED["gqa"] = ("test", "challenge")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data folder of each benchmark; tests that change it write their own."""
    made = {name: tmp_path_factory.mktemp(name) for name in WRITERS}
    for name, folder in made.items():
        WRITERS[name](folder)
    return made


def task_of(name: str, folder: Path, **fields: Any) -> Task:
    return Task.of(EvalConfig(benchmark=name, data=folder, **{"shots": (0, 2), **fields}))


def change(path: Path, edit: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(edit(data) or data))


@pytest.mark.parametrize("name", WRITERS)
def test_every_split_is_read_with_its_pictures(name: str, folders: dict[str, Path]):
    benchmark = benchmarks.load(name)
    for split in benchmark.FILES:
        task = task_of(name, folders[name], split=split)
        assert [q.question for q in task.queries] == list(fixtures_vqa.QUESTIONS)
        assert len(task.pool) == 4
        assert all(bool(q.answers) == (split not in UNANSWERED.get(name, ())) for q in task.queries)
        assert {file.path for file in benchmark.FILES[split] if file.images} == {
            q.image.parent.relative_to(folders[name]).as_posix() for q in task.queries
        }


def test_questions_about_coco_carry_ids_answers_and_kinds(folders: dict[str, Path]):
    first = task_of("vqav2", folders["vqav2"]).queries[0]
    assert (first.id, first.kind) == ("42000", "other")
    assert first.image == folders["vqav2"] / "val2014" / "COCO_val2014_000000000042.jpg"
    assert first.answers == tuple(fixtures_vqa.ten("blue", 0))
    kinds = [q.kind for q in task_of("vqav2", folders["vqav2"]).queries]
    assert kinds == ["other", "number", "yes/no", "other"]
    known = task_of("okvqa", folders["okvqa"]).queries
    assert [q.kind for q in known][:3] == ["Plants and Animals", "Science and Technology", "Other"]
    assert known[0].answers[0] == "blue"  # as it is scored, not as it was given


def test_textvqa_carries_recognised_words_where_they_are(folders: dict[str, Path]):
    queries = task_of("textvqa", folders["textvqa"]).queries
    assert [q.context for q in queries] == ["DOG 7", "DOG 7", "", ""]
    assert queries[0].id == "34602"
    assert {q.context for q in task_of("textvqa", folders["textvqa"], split="train").queries} == {""}


def test_vizwiz_names_questions_by_their_picture_and_keeps_the_unanswerable(folders: dict[str, Path]):
    last = task_of("vizwiz", folders["vizwiz"]).queries[-1]
    assert (last.id, last.kind) == ("VizWiz_val_00000003.jpg", "unanswerable")
    assert last.answers[0] == "unanswerable"


def test_gqa_names_the_answer_and_the_structure_of_the_question(folders: dict[str, Path]):
    first = task_of("gqa", folders["gqa"]).queries[0]
    assert (first.id, first.answers, first.kind) == ("00000200", ("blue",), "query")
    assert first.image == folders["gqa"] / "images" / "n200.jpg"


@pytest.mark.parametrize("name", WRITERS)
def test_prompts_are_open_flamingos_and_shots_give_the_first_answer(name: str, folders: dict[str, Path]):
    task = task_of(name, folders[name])
    setting = Setting(shots=2, seed=1)
    query = task.queries[0]
    shots = choose_shots(task.pool, query, setting)
    prompt = build(task.benchmark, query, shots, setting)
    assert prompt.text == "<image>Question:What color is the dog? Short answer:"
    assert prompt.prefix == "".join(
        f"<image>Question:{s.question} Short answer:{s.answers[0]}<|endofchunk|>" for s in shots
    )
    assert prompt.prefix_images == tuple(s.image for s in shots)
    other = task.template(1)
    assert other is not None
    assert other(query) == "Question:What color is the dog? Answer:"


def test_generated_text_is_cut_as_open_flamingo_cuts_it():
    table = [
        ("blue", "blue"),
        (" blue Question:What", "blue"),
        ("blue\nQuestion: is", "blue"),
        ("blueShort answer:", "blue"),
        ("the Answer is blue", "the"),
        ("red, white", "red"),
        ("red,white", "red,white"),
        ("1,000 dogs", "1,000 dogs"),
        ("Question:", ""),
        (", red", ""),
        ("a question", "a question"),
        ("Yes. It is.", "Yes. It is."),
    ]
    for name in ("vqav2", "okvqa", "textvqa", "vizwiz"):
        tidy = benchmarks.load(name).tidy
        assert [tidy(text) for text, _ in table] == [wanted for _, wanted in table]
    assert [benchmarks.load("gqa").tidy(t) for t in ("Left.", " LEFT Question:", "T-shirt")] == [
        "left", "left", "t-shirt",
    ]  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_the_first_metric_scores_the_first_answers_as_right(name: str, folders: dict[str, Path]):
    task = task_of(name, folders[name])
    right = [Prediction(q.id, task.benchmark.tidy(q.answers[0])) for q in task.queries]
    wrong = [Prediction(q.id, "no such thing") for q in task.queries]
    for each in task.benchmark.METRICS:
        metric = metrics.load(each)
        assert metric.value(wrong, task.queries) == 0
        # VQAv2's and TextVQA's last answer has a comma, where predictions are cut.
        scores = metric.per_sample(right, task.queries)
        assert scores[:3] == pytest.approx([1, 1, 1])
        cut = "," in task.queries[3].answers[0]
        assert scores[3] == pytest.approx(0 if cut else 1)


@pytest.mark.parametrize("name, split", [(name, s) for name, splits in UNANSWERED.items() for s in splits])
def test_splits_without_answers_are_predicted_and_not_scored(name: str, split: str, folders: dict[str, Path]):
    task = task_of(name, folders[name], split=split)
    predictions = [Prediction(q.id, "blue") for q in task.queries]
    for each in task.benchmark.METRICS:
        metric = metrics.load(each)
        assert metric.per_sample(predictions, task.queries) is None
        with pytest.raises(ValueError, match="4 of 4 questions have no answers"):
            metric.value(predictions, task.queries)


class Blue:
    """A predictor that always says blue."""

    def predict(self, prompts: list[Prompt]) -> Iterator[tuple[Prompt, str]]:
        yield from ((prompt, "blue Question:") for prompt in prompts)


@pytest.mark.parametrize("split, scores", [("val", [1.0, 0.0, 0.0, 0.0]), ("test", [None] * 4)])
def test_a_run_writes_every_prediction_with_its_score_where_there_is_one(
    split: str, scores: list, folders: dict[str, Path], tmp_path: Path
):
    config = EvalConfig(benchmark="vqav2", data=folders["vqav2"], split=split, shots=(2,))
    setting = Setting(shots=2)
    Part(Task.of(config), config, Blue(), tmp_path, 0, 1).run(setting)
    records = read_answers(answer_files(tmp_path, setting))
    assert [r["prediction"] for r in records] == ["blue"] * 4
    assert [r["score"] for r in records] == scores


@pytest.mark.parametrize("name", WRITERS)
def test_describe_finds_the_folder_complete(name: str, folders: dict[str, Path]):
    said, complete = describe(name, folders[name])
    assert complete, said
    assert "not there" not in said
    assert said.endswith("complete")
    files = benchmarks.load(name).FILES["train"]
    assert all(file.where in describe(name)[0] for file in files)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_not_there_is_named_with_the_command_that_says_where(name: str, tmp_path: Path):
    benchmark = benchmarks.load(name)
    path = tmp_path / benchmark.FILES[benchmark.QUERIES][0].path
    with pytest.raises(ValueError, match=f"{path.name} is not there; `flamingo eval describe {name}`"):
        task_of(name, tmp_path)
    path.write_text('{"questions": [')
    with pytest.raises(ValueError, match=f"{path.name} is not whole JSON"):
        task_of(name, tmp_path)
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="has 'a' twice in one object"):
        task_of(name, tmp_path)
    path.write_text('{"dataset": "another"}')
    with pytest.raises(ValueError, match="is it the published file"):
        task_of(name, tmp_path)


VQAV2 = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")


@pytest.mark.parametrize(
    "file, edit, said",
    [
        (1, lambda d: d["annotations"].pop(), "answers 3 of 4 questions of .*43001 is missing: both files"),
        (0, lambda d: d["questions"].pop(), "answers question_id 43001, which v2_OpenEnded.* does not ask"),
        (1, lambda d: d["annotations"].append(d["annotations"][0]), "question_id 42000 more than once"),
        (0, lambda d: d["questions"].append(d["questions"][0]), "1 ids come more than once.*'42000'"),
        (1, lambda d: d["annotations"][0].update(image_id=7), "42000 about image 7, .* about image 42"),
        (1, lambda d: d["annotations"][1].update(answers=[]), "entry 1 must have answers .* has \\[\\]"),
        (1, lambda d: d["annotations"][1].update(answers=[{"text": "a"}]), "entry 1 must have answers that"),
        (1, lambda d: d["annotations"][1].pop("question_id"), "entry 1 has no 'question_id', only image_id"),
        (0, lambda d: d["questions"][2].pop("question"), "entry 2 has no 'question'"),
        (0, lambda d: d["questions"][2].update(image_id="x.jpg"), "image_id 'x.jpg'; it must be a number"),
        (0, lambda d: d["questions"].clear(), "answers question_id 42000, which"),
    ],
)
def test_questions_and_annotations_that_do_not_match_are_named(
    file: int, edit: Any, said: str, tmp_path: Path
):
    WRITERS["vqav2"](tmp_path)

    def changed(data: dict) -> None:
        edit(data)

    change(tmp_path / VQAV2[file], changed)
    with pytest.raises(ValueError, match=said):
        task_of("vqav2", tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_picture_is_named(name: str, tmp_path: Path):
    WRITERS[name](tmp_path)
    query = task_of(name, tmp_path).queries[0]
    query.image.unlink()
    with pytest.raises(ValueError, match=f"pictures are missing, the first is .*{query.image.name}"):
        task_of(name, tmp_path)


@pytest.mark.parametrize(
    "name, file, edit, said",
    [
        (
            "textvqa",
            "TextVQA_0.5.1_val.json",
            lambda d: d["data"][1].pop("answers"),
            "entry 1 must have answ",
        ),
        (
            "textvqa",
            "TextVQA_0.5.1_val.json",
            lambda d: d["data"][1].pop("image_id"),
            "entry 1 has no 'image",
        ),
        ("vizwiz", "val.json", lambda d: d[2].pop("answers"), "entry 2 must have answers"),
        ("vizwiz", "val.json", lambda d: d.append(d[0]), "more than once, the first is 'VizWiz_val_00000000"),
        (
            "gqa",
            "testdev_balanced_questions.json",
            lambda d: d["00000201"].pop("answer"),
            "entry 00000201 has",
        ),
        (
            "gqa",
            "testdev_balanced_questions.json",
            lambda d: d["00000201"].pop("imageId"),
            "no 'imageId', on",
        ),
    ],
)
def test_entries_that_lack_something_are_named(name: str, file: str, edit: Any, said: str, tmp_path: Path):
    WRITERS[name](tmp_path)

    def changed(data: Any) -> None:
        edit(data)

    change(tmp_path / file, changed)
    with pytest.raises(ValueError, match=said):
        task_of(name, tmp_path)


def test_a_split_that_is_not_there_lists_the_splits(folders: dict[str, Path]):
    with pytest.raises(
        ValueError, match="VQAv2 has no split 'dev': choose one of train, val, test-dev, test"
    ):
        task_of("vqav2", folders["vqav2"], split="dev")
    with pytest.raises(ValueError, match="shots=8: OK-VQA has only 4 demonstrations"):
        task_of("okvqa", folders["okvqa"], shots=(8,))


COPIED = {  # how the copies on the hub write a question with and without answers
    "vqav2": [
        {"question_id": 7, "question": "What?", "answers": [{"answer": "blue", "answer_id": 1}] * 10,
         "answer_type": "other"},
        {"question_id": 8, "question": "Who?", "answers": None, "answer_type": None},
    ],
    "textvqa": [
        {"question_id": 7, "question": "What?", "answers": ["blue"] * 10, "ocr_tokens": ["DOG", "7"]},
        {"question_id": 8, "question": "Who?", "answers": [""] * 10, "ocr_tokens": []},
    ],
    "vizwiz": [
        {"question_id": "a.jpg", "question": "What?", "answers": ["blue"] * 10, "category": "other"},
        {"question_id": "b.jpg", "question": "Who?", "answers": [], "category": None},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", COPIED)
def test_a_copy_in_the_hubs_layout_gives_the_same_kind_of_examples(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    copy = benchmarks.load(name).HUB
    fixtures_vqa.picture(tmp_path / "1.png", 1)
    rows = [{**row, "image": str(tmp_path / "1.png")} for row in COPIED[name]]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "copy" / "data" / f"{copy.splits['val']}-00000-of-00001.parquet")
    found = task_of(name, Path(f"hub:{tmp_path / 'copy'}"), shots=(0,), zero_shot="none").queries
    assert [q.id for q in found] == [str(row["question_id"]) for row in COPIED[name]]
    assert [q.answers for q in found] == [("blue",) * 10, ()]
    assert [q.kind for q in found] == [COPIED[name][0].get("answer_type", found[0].kind), ""]
    assert found[0].context == ("DOG 7" if name == "textvqa" else "")


def test_a_benchmark_without_a_copy_on_the_hub_says_so():
    for name in ("okvqa", "gqa"):
        with pytest.raises(ValueError, match="data=hub: .* knows no copy on the hub"):
            task_of(name, Path("hub"))
