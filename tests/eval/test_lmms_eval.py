"""The plug-in for lmms-eval, alone and in runs of that harness itself, on a tiny model."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.eval.harness_model import other_tests_untouched, picture, write_model

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (Makefile says how)")
with other_tests_untouched():
    from lmms_eval import evaluator, models
    from lmms_eval.api.instance import Instance
    from lmms_eval.tasks import TaskManager

from flamingo.eval import asking, benchmarks, metrics  # noqa: E402
from flamingo.eval.asking import Asked, Asker, placed, turn_text  # noqa: E402
from flamingo.eval.benchmarks import Prediction  # noqa: E402
from flamingo.eval.lmms_eval import ARGUMENTS, FlamingoChat, FlamingoSimple, manifest  # noqa: E402
from flamingo.eval.tasks import FOLDER, few_shot  # noqa: E402
from flamingo.eval.tasks.__main__ import write_tasks  # noqa: E402
from tests.eval.fixtures_captions import write_hateful_memes  # noqa: E402

ASK = "Question: what color is the shape? Answer:"
CHOICES = (" red", " blue", " circle")
SHOT = f"<image>{ASK} red<|endofchunk|>"
EASY = json.dumps({"benchmark": "easy_vqa", "shots": 4, "seed": 0, "choice": False}, sort_keys=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def asker(folder) -> Asker:
    return Asker(folder, device="cpu")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """lmms-eval's data goes into a folder of the test."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def prompts() -> list[Asked]:
    """Of different lengths, with two pictures, one and none."""
    return [
        Asked(f"{SHOT}<image>{ASK}", (picture(0), picture(1))),
        Asked(f"<image>{ASK}", (picture(2),)),
        Asked("What's this?"),
        Asked(f"<image>{ASK} red or blue? Answer:", (picture(3),)),
    ]


def direct(asker: Asker, asked: Asked, **options) -> torch.Tensor:
    """int64[T]: what processor and model alone make of one prompt."""
    inputs = asker.processor(text=[asked.text], images=list(asked.images) or None)
    return asker.model.generate(**inputs, do_sample=False, pad_token_id=0, **options)[
        0, inputs["input_ids"].shape[1] :
    ]


def spoken(asker: Asker, tokens: torch.Tensor) -> str:
    return asker.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def request(kind: str, *arguments) -> Instance:
    metadata = {"task": "t", "doc_id": arguments[-3], "repeats": 1}
    return Instance(kind, tuple(arguments), 0, metadata)  # type: ignore[arg-type]


def harness(model, tasks, include: Path, **options) -> dict:
    """A run of lmms-eval."""
    evaluator._enable_reentrant_filelocks._patched = False  # type: ignore[attr-defined]
    manager = TaskManager(include_path=str(include), include_defaults=False, model_name="flamingo")
    with other_tests_untouched():
        return evaluator.simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
        )  # type: ignore[return-value]


# -- prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("a", 0, "a"),
        ("a", 2, "<image><image>a"),
        ("a <image> b", 1, "a <image> b"),
        ("the <image> tag", 0, "the image tag"),
        ("<image>, the second <image>", 1, "<image>image, the second image"),
    ],
)
def test_pictures_stand_where_the_text_says_or_before_it(text, images, expected):
    assert placed(text, images) == expected


def test_a_turn_has_its_pictures_between_its_texts():
    image = {"type": "image", "url": "a.png"}
    assert turn_text([{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]) == "a<image>b"
    assert turn_text([image, {"type": "text", "text": "a <image> b"}]) == "a <image> b"
    assert turn_text([image, image, {"type": "text", "text": "<image>"}]) == "<image><image>image"
    assert turn_text("no <image> here") == "no image here"


def test_a_chat_is_shots_that_end_as_in_training(asker):
    picture_part = {"type": "image", "url": picture(0)}
    ask = {"role": "user", "content": [picture_part, {"type": "text", "text": ASK}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": " red"}]}
    asked = asker.chat([ask, answer, ask])
    assert asked.text == f"{SHOT}<image>{ASK}" and len(asked.images) == 2
    assert asker.chat([ask, answer]).text == f"<image>{ASK} red", "an answer that was begun is gone on with"


def test_a_chat_lm_can_be_asked_in_its_own_words(folder):
    own = Asker(folder, device="cpu", chat_template="own")
    own.processor.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    image = {"type": "image", "url": picture(0)}
    asked = own.chat([{"role": "user", "content": [image, {"type": "text", "text": ASK}]}])
    assert asked.text == f"[user]<image>{ASK}"


# -- answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_is_the_models_own_whatever_the_batch(asker, beams):
    options = {"max_new_tokens": 6, "num_beams": beams}
    together = asker.generate(prompts(), options)
    alone = [asker.generate([each], options)[0] for each in prompts()]
    assert together == alone
    assert [s.text for s in alone] == [spoken(asker, direct(asker, each, **options)) for each in prompts()]
    assert len({said.text for said in alone}) == len(alone), "the tiny model says different things"


def test_the_picture_decides(asker):
    said = asker.generate([Asked(f"<image>{ASK}", (picture(n),)) for n in range(4)], {"max_new_tokens": 6})
    assert len({each.text for each in said}) > 1


def test_an_answer_ends_before_its_stop_strings(asker):
    (whole,) = asker.generate(prompts()[:1], {"max_new_tokens": 8})
    stop = whole.text[3]
    (cut,) = asker.generate(prompts()[:1], {"max_new_tokens": 8, "until": [stop, "never said"]})
    assert cut.text == whole.text.partition(stop)[0].strip() and cut.made < whole.made


def test_sampling_is_what_a_task_asks_for(asker):
    assert not asking.generation_options({"temperature": 0, "do_sample": True})["do_sample"]
    assert not asking.generation_options({"temperature": 1.0, "do_sample": False})["do_sample"]
    assert asking.generation_options({"temperature": 0.7}) == {"do_sample": True, "temperature": 0.7}
    greedy = asker.generate(prompts()[:1], {"max_new_tokens": 8})[0].text
    torch.manual_seed(0)
    hot = {"max_new_tokens": 8, "temperature": 5.0}
    assert {asker.generate(prompts()[:1], hot)[0].text for _ in range(5)} - {greedy}


def test_each_picture_is_encoded_once_and_the_oldest_are_let_go(folder, monkeypatch):
    asker = Asker(folder, device="cpu", cached_images=2)
    encoded: list[int] = []
    whole = asker.model.encode_images
    monkeypatch.setattr(asker.model, "encode_images", lambda x: encoded.append(len(x)) or whole(x))
    asked = [Asked(f"{SHOT}<image>{ASK}", (picture(0), picture(1)))] * 2
    said = asker.generate(asked, {"max_new_tokens": 3})
    assert encoded == [2] and said[0] == said[1]
    asker.likelihoods([(asked[0], " red"), (asked[0], " blue")])
    assert encoded == [2], "another copy of the same picture is known"
    asker.generate([Asked("<image>" * 3, (picture(2), picture(3), picture(1)))], {"max_new_tokens": 1})
    assert encoded == [2, 2] and len(asker.latents) == 2, "a batch may have more pictures than are kept"
    assert asker.generate(asked, {"max_new_tokens": 3}) == said


# -- likelihoods ---------------------------------------------------------------------------


@torch.inference_mode()
def by_hand(asker: Asker, prompt: Asked, continuation: str) -> tuple[float, bool]:
    """From the logits of one row, token by token."""
    start = len(asker.tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    inputs = asker.processor(text=[prompt.text + continuation], images=list(prompt.images) or None)
    logits = asker.model(**inputs).logits[0].log_softmax(dim=-1)
    ids = inputs["input_ids"][0]
    places = range(start, len(ids))
    total = sum(float(logits[place - 1, ids[place]]) for place in places)
    return total, all(int(logits[place - 1].argmax()) == ids[place] for place in places)


def test_a_likelihood_is_the_sum_over_the_tokens_of_the_continuation(asker):
    pairs = [(prompt, word) for prompt in prompts() for word in (" red", " circle", " What's this?")]
    found = asker.likelihoods(pairs)
    for (prompt, word), (value, greedy) in zip(pairs, found, strict=True):
        wanted, is_greedy = by_hand(asker, prompt, word)
        assert value == pytest.approx(wanted, abs=1e-3) and greedy == is_greedy


def test_what_the_model_would_say_is_greedy(asker):
    """Of single tokens, so that a text is tokenised as it was said."""
    seen = []
    for prompt in prompts():
        (token,) = direct(asker, prompt, max_new_tokens=1)
        text, blank = asker.tokenizer.decode(token), asker.tokenizer.decode(token).isspace()
        if asker.tokenizer(text, add_special_tokens=False)["input_ids"] == [int(token)] and not blank:
            ((_, greedy), (_, other)) = asker.likelihoods([(prompt, text), (prompt, " zzz")])
            seen.append((greedy, other))
    assert seen and set(seen) == {(True, False)}


def test_blanks_between_prompt_and_continuation_may_stand_on_either_side(asker):
    image = (picture(1),)
    pairs = [(Asked(f"<image>{ASK}", image), " red"), (Asked(f"<image>{ASK} ", image), "red")]
    one, other = asker.likelihoods(pairs)
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert asker.likelihoods([(Asked(""), "red")])[0][0] < 0, "an empty prompt is one too"


@pytest.mark.parametrize("form", [FlamingoSimple, FlamingoChat])
def test_choices_come_as_losses_and_targets_as_log_probabilities(folder, asker, form):
    model = form(str(folder), device="cpu", batch_size=2)
    model.task_dict = {"t": {"test": [{"answer": " red"}, {"answer": " blue"}]}}
    target, images = (lambda doc: doc["answer"]), (lambda doc: [picture(5)])
    told = [request("loglikelihood", ASK, target, images, number, "t", "test") for number in (0, 1)]
    chosen = [request("loglikelihood", ASK, word, images, 0, "t", "test") for word in (" red", " blue")]
    found = model.loglikelihood([told[0], chosen[1], told[1], chosen[0]])
    wanted = [value for value, _ in asker.likelihoods([(Asked(f"<image>{ASK}", (picture(5),)), " red")])] + [
        value for value, _ in asker.likelihoods([(Asked(f"<image>{ASK}", (picture(5),)), " blue")])
    ]
    values = [value for value, _ in found]
    assert values == pytest.approx([wanted[0], -wanted[1], wanted[1], -wanted[0]], abs=1e-4)
    assert all(isinstance(pair, tuple) and isinstance(pair[1], bool) for pair in found)


def test_the_harness_leaves_other_tests_alone():
    from filelock import FileLock
    from PIL import ImageFile

    assert not ImageFile.LOAD_TRUNCATED_IMAGES and "_patched_call" not in type(FileLock).__call__.__name__


# -- lmms-eval itself ----------------------------------------------------------------------


def test_the_harness_knows_the_model_by_its_entry_point():
    assert models.get_model("flamingo") is FlamingoChat
    assert models.get_model("flamingo", force_simple=True) is FlamingoSimple
    assert models.get_model_manifest("flamingo") == manifest()


def test_shots_are_those_of_our_own_evaluation(asker):
    docs = few_shot.documents([json.loads(EASY)])
    run = few_shot.opened(EASY)
    for doc in docs.select(range(0, len(docs), 3000)):
        prompt = run.prompt(doc)
        asked = asker.chat(few_shot.messages(doc))
        assert asked.text == few_shot.text(doc) == prompt.prefix + prompt.text
        assert list(asked.images) == [str(p) for p in (*prompt.prefix_images, *prompt.images)]
        assert len(few_shot.pictures(doc)) == 5 and few_shot.messages(doc) == few_shot.messages(doc)
        assert all("/train/" in image for image in asked.images[:-1]) and "/test/" in asked.images[-1]


@pytest.mark.parametrize("simple", [False, True])
def test_a_run_asks_what_our_own_evaluation_asks(folder, asker, offline, simple):
    found = harness(
        "flamingo",
        ["flamingo_easy_vqa_4shot"],
        FOLDER,
        model_args=f"pretrained={folder},device=cpu",
        batch_size=3,
        limit=5,
        force_simple=simple,
    )
    samples = found["samples"]["flamingo_easy_vqa_4shot"]
    run, said = few_shot.opened(EASY), []
    for sample, query in zip(samples, list(run.examples.values())[:5], strict=True):
        prompt = run.prompt({"id": query.id})
        asked = Asked(prompt.prefix + prompt.text, (*prompt.prefix_images, *prompt.images))
        said.append(spoken(asker, direct(asker, asked, max_new_tokens=5, num_beams=3)))
        assert sample["resps"][0] == [said[-1]]
    predictions = [Prediction(q.id, t.lower()) for q, t in zip(run.examples.values(), said, strict=False)]
    value = metrics.load("exact_match").value(predictions, list(run.examples.values())[:5])
    assert found["results"]["flamingo_easy_vqa_4shot"]["exact_match,none"] == 100 * value


CODE = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"])]

def target(doc):
    return doc["answer"]

def results(doc, answers):
    # The harness's own takes of one (value, greedy) two values, and fails.
    return {"perplexity": answers[0][0], "greedy": answers[0][1]}
"""


def write_choices(folder: Path, kind: str) -> list[dict]:
    """A task of lmms-eval's own scoring on four pictures."""
    rows = []
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
        rows.append({"image": str(folder / f"{number}.png"), "gold": number % 3, "answer": " blue"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "code.py").write_text(CODE)
    task = {
        "multiple_choice": "doc_to_choice: [red, blue, circle]\ndoc_to_target: gold\ntarget_delimiter: ' '\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n",
        "loglikelihood": "doc_to_target: !function code.target\nprocess_results: !function code.results\n"
        "metric_list:\n  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n",
    }[kind]
    (folder / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: rows.jsonl}}}}\n"
        f"test_split: test\noutput_type: {kind}\ndoc_to_visual: !function code.visual\n"
        f'doc_to_text: "{ASK}"\n{task}'
    )
    return rows


def test_the_harness_finds_the_likeliest_choice(folder, asker, offline, tmp_path):
    rows = write_choices(tmp_path, "multiple_choice")
    model = FlamingoSimple(str(folder), device="cpu", batch_size=4)
    found = harness(model, ["local"], tmp_path)
    hits = []
    for row in rows:
        values = [by_hand(asker, Asked(f"<image>{ASK}", (row["image"],)), w)[0] for w in CHOICES]
        hits.append(values.index(max(values)) == row["gold"])
    assert found["results"]["local"]["acc,none"] == pytest.approx(sum(hits) / 4)
    assert {s["acc"] for s in found["samples"]["local"]} == {0.0, 1.0}, "some are right and some are wrong"


def test_the_harness_computes_a_perplexity(folder, asker, offline, tmp_path):
    rows = write_choices(tmp_path, "loglikelihood")
    found = harness(FlamingoSimple(str(folder), device="cpu"), ["local"], tmp_path)
    values = [by_hand(asker, Asked(f"<image>{ASK}", (row["image"],)), " blue")[0] for row in rows]
    wanted = float(torch.tensor(values).mean().neg().exp())
    assert all(isinstance(sample["greedy"], bool) for sample in found["samples"]["local"])
    assert found["results"]["local"]["perplexity,none"] == pytest.approx(wanted, rel=1e-3)


ROUNDS = f'''
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"])]

def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return "{ASK}"
    done = round_idx == doc["rounds"]
    return visual(doc), f"{ASK} {{previous_output[-1]}} Answer:", done, previous_output, round_idx

def results(doc, answers):
    answers = answers[0]
    return {{"rounds": len(answers), "said": "|".join(answers)}}
'''


@pytest.mark.parametrize("form", [FlamingoSimple, FlamingoChat])
def test_rounds_go_on_until_the_task_ends_them(folder, asker, offline, tmp_path, form):
    rows = write_choices(tmp_path, "loglikelihood")
    rows = [{**row, "rounds": 1 + number % 3} for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "code.py").write_text(ROUNDS)
    (tmp_path / "local.yaml").write_text(
        "task: local\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "test_split: test\noutput_type: generate_until_multi_round\ndoc_to_visual: !function code.visual\n"
        "doc_to_text: !function code.text\ndoc_to_target: answer\nprocess_results: !function code.results\n"
        "generation_kwargs: {max_new_tokens: 3, until: []}\n"
        "metric_list:\n  - {metric: rounds, aggregation: mean, higher_is_better: true}\n"
    )
    model = form(str(folder), device="cpu", batch_size=3)
    found = harness(model, ["local"], tmp_path)
    assert found["results"]["local"]["rounds,none"] == pytest.approx((1 + 2 + 3 + 1) / 4)
    for row, sample in zip(rows, found["samples"]["local"], strict=True):
        said, text = [], ASK
        for _ in range(row["rounds"]):
            asked = Asked(f"<image>{text}", (row["image"],))
            said.append(spoken(asker, direct(asker, asked, max_new_tokens=3)))
            text = f"{ASK} {said[-1]} Answer:"
        assert sample["said"] == "|".join(said)


def test_classes_of_official_files_are_ranked_with_their_shots(folder, offline, tmp_path):
    data = write_hateful_memes(tmp_path / "data")
    names = write_tasks(tmp_path / "tasks", "hateful_memes", [2], 0, False, {"data": str(data)})
    assert names == ["flamingo_hateful_memes_2shot_choice"]
    model = FlamingoSimple(str(folder), device="cpu", batch_size=8)
    asker = model.asker
    items = harness(model, names, tmp_path / "tasks")
    settings = json.dumps(
        json.loads((tmp_path / "tasks/hateful_memes_2shot_choice.json").read_text()), sort_keys=True
    )
    run, predictions = few_shot.opened(settings), []
    asker.model = Asker(folder, device="cpu").model  # the harness gave the first back
    for query in run.examples.values():
        prompt = run.prompt({"id": query.id})
        asked = Asked(prompt.prefix + prompt.text, (*prompt.prefix_images, *prompt.images))
        scores = [value for value, _ in asker.likelihoods([(asked, c) for c in (" yes", " no")])]
        predictions.append(Prediction(query.id, "yes" if scores[0] > scores[1] else "no", tuple(scores)))
    for name in benchmarks.load("hateful_memes").METRICS:
        metric = metrics.load(name)
        wanted = metric.SCALE * metric.value(predictions, list(run.examples.values()))
        assert items["results"][names[0]][f"{name},none"] == pytest.approx(wanted)


def test_the_tasks_here_are_those_that_the_command_writes(tmp_path):
    write_tasks(tmp_path, "easy_vqa", [0, 4, 8, 16, 32], 0, False, {})
    write_tasks(tmp_path, "easy_vqa", [0, 4], 0, True, {})
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {
        p.name: p.read_text() for p in FOLDER.iterdir() if p.suffix not in (".py", "") or p.name in files
    }


def test_the_page_names_every_argument_option_and_task():
    page = (Path(__file__).parents[2] / "docs" / "harnesses.md").read_text()
    signature = inspect.signature(FlamingoChat.__init__).parameters
    arguments = [name for name in signature if name not in ("self", "unknown")]
    assert arguments == ARGUMENTS.split()
    assert [n for n in (*arguments, *asking.OPTIONS, *asking.TEMPLATES) if n not in page] == []
    tags = {line.split()[1] for p in FOLDER.glob("*.yaml") for line in p.open() if line.startswith("tag:")}
    assert tags == {"flamingo_easy_vqa", "flamingo_easy_vqa_choice"} and all(f"`{t}`" in page for t in tags)


@pytest.mark.slow
def test_the_command_line_runs_a_task_and_logs_its_samples(folder, tmp_path):
    command = [sys.executable, "-m", "lmms_eval", "--model", "flamingo", "--model_args"]
    command += [f"pretrained={folder},device=cpu", "--tasks", "flamingo_easy_vqa_0shot", "--include_path"]
    command += [str(FOLDER), "--limit", "3", "--batch_size", "2", "--output_path", str(tmp_path / "out")]
    command += ["--log_samples", "--verbosity", "DEBUG"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert "flamingo_easy_vqa_0shot" in done.stdout, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert "exact_match,none" in json.loads(results.read_text())["results"]["flamingo_easy_vqa_0shot"]
    (samples,) = (tmp_path / "out").rglob("*_samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": ""}, "pretrained=FOLDER is missing"),
        ({"pretrained": "nowhere"}, "nowhere holds no model"),
        ({"beam": 3}, "unknown 'beam'; did you mean 'beams'?"),
        ({"batch_size": "auto"}, "batch_size='auto': must be a number of at least 1"),
        ({"cached_images": 0}, "cached_images=0: must be"),
        ({"dtype": "int4"}, "dtype='int4': choose one of auto, float32"),
        ({"chat_template": "mine"}, "chat_template='mine': choose one of few_shot, own"),
        ({"device": "tpux"}, "device='tpux': write cpu, cuda or cuda:0"),
    ],
)
def test_wrong_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        FlamingoChat(**{"pretrained": str(folder), **arguments})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 0}, "num_beams=0: must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"until": [3]}, "3 is not text"),
    ],
)
def test_wrong_generation_options_are_named(asker, given, message):
    with pytest.raises(ValueError, match=message):
        asker.generate(prompts()[:1], given)


def test_options_that_mean_nothing_here_are_named_once(folder):
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), level="WARNING")
    model = FlamingoSimple(str(folder), device="cpu", beams=2, max_new_tokens=7)
    options = [model._options({"image_aspect_ratio": "pad", "temperature": 0}) for _ in range(2)]
    logger.remove(sink)
    assert options[0] == {"num_beams": 2, "max_new_tokens": 7, "temperature": 0}
    assert sum("image_aspect_ratio='pad'" in line for line in lines) == 1


def test_videos_sounds_and_numbers_as_targets_are_refused(folder):
    chat, simple = (form(str(folder), device="cpu") for form in (FlamingoChat, FlamingoSimple))
    for model in (chat, simple):
        model.task_dict = {"t": {"test": [{}]}}
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(ValueError, match="t, document 0: a part of type 'video'"):
        chat.generate_until([request("generate_until", "", lambda doc: video, {}, 0, "t", "test")])
    sound = [{"array": [0.0], "sampling_rate": 1}]
    with pytest.raises(ValueError, match="t, document 0: doc_to_visual gives a dict"):
        simple.generate_until([request("generate_until", "", {}, lambda doc: sound, 0, "t", "test")])
    with pytest.raises(ValueError, match="doc_to_target=3: a continuation is text"):
        simple.loglikelihood([request("loglikelihood", "a", lambda doc: 3, None, 0, "t", "test")])
    with pytest.raises(ValueError, match="picture missing.png cannot be read"):
        missing = request("generate_until", "", {}, lambda doc: ["missing.png"], 0, "t", "test")
        simple.generate_until([missing])


def test_settings_of_a_task_are_checked_when_it_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has one row of settings, this one 2"):
        few_shot.documents([{}, {}])
    with pytest.raises(ValueError, match="shots_from='similar': tasks of lmms-eval have no index"):
        write_tasks(tmp_path, "easy_vqa", [4], 0, False, {"shots_from": "similar"})
    with pytest.raises(ValueError, match="has no split 'dev'"):
        write_tasks(tmp_path, "easy_vqa", [4], 0, False, {"split": "dev"})
    assert not list(tmp_path.iterdir()), "nothing is written that could not be run"
    many = SimpleNamespace(TITLE="Captions", completion=lambda shot: f" {shot}")
    with pytest.raises(ValueError, match="Captions has 200 different answers .* leave choice out"):
        few_shot._choices(SimpleNamespace(classes=(), benchmark=many, pool=range(200)))  # type: ignore[arg-type]
