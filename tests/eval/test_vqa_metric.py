"""VQA accuracy against the official rules: a frozen table, and OpenFlamingo's copy of the official code."""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flamingo.eval import metrics
from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.benchmarks import _vqa as benchmark
from flamingo.eval.metrics import _vqa, gqa, vqa, vqa_open_flamingo, vqa_textvqa, vqa_vizwiz

ODD = [  # texts, and what the official code made of them
    ("", ""), (" ", ""), ("Yes.", "yes"), ("yes!", "yes"), ("a dog", "dog"), ("The a an", ""),
    ("a-frame", "frame"), ("t-shirt", "t shirt"), ("t- shirt", "t shirt"),
    ("t -shirt t-shirt", "t shirt tshirt"), ("1,000", "1000"), ("1,000 t-shirts", "1000 tshirts"),
    ("1, 000", "1 000"), ("red, white", "red white"), ("red,white", "red white"),
    ("red / white and black/blue", "red white and blackblue"), ("3.5", "3.5"), ("3. 5", "3 5"),
    (".5", ".5"), ("5.", "5"), ("v1.2.", "v1.2"), ("...", ""), ("u.s.a.", "usa"),
    ("a." * 40, "a" * 33 + ".a" * 7 + "."), ("no" + "." * 41, "no" + "." * 9),
    ("none", "0"), ("Two", "2"), ("ten", "10"), ("eleven", "eleven"), ("two-three", "2 3"),
    ("oneself", "oneself"), ("DONT", "don't"), ("don't", "don't"), ("Im", "im"), ("Id've", "id've"),
    ("shes", "shes"), ("she's", "she's"), ("somebody'd", "somebodyd"), ("somebodyd", "somebodyd"),
    ("'ows'at", "'ow's'at"), ("y'alld've", "y'all'd've"), ("couldnt've", "couldn't've"),
    ("what's up?", "what's up"), ("what ?!", "what"), ("( left)", "left"), ("5'4\"", "5'4"),
    ("$5", "$5"), ("50%", "50%"), ("10:30", "10:30"), ("e-mail@home", "e mail home"), ("\\n", "n"),
    ("one\u00a0two", "1 2"), ("Ünder", "ünder"), ("x_y_z", "x y z"), ("#1 & co", "#1 & co"),
    ("a:b;c", "a:b c"), ("dog\tcat", "dog cat"), ("dog\n cat", "dog cat"), ("“quoted”", "“quoted”"),
    ("zero.", "0"), (".zero", "0"), ("1the", "1the"),
]  # fmt: skip


def one(answers: Sequence[str], text: str) -> tuple[list[Prediction], list[Example]]:
    return [Prediction("1", text)], [Example("1", Path("1.jpg"), "?", tuple(answers))]


def test_odd_texts_are_normalised_as_the_official_code_does():
    wrong = [(text, _vqa.normalised(text), to) for text, to in ODD if _vqa.normalised(text) != to]
    assert not wrong


@pytest.mark.parametrize("same, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_is_the_mean_over_the_nine_others_of_ten_people(same: int, accuracy: float):
    answers = ["dog"] * same + [f"other {n}" for n in range(10 - same)]
    for metric in (vqa, vqa_open_flamingo, vqa_textvqa, vqa_vizwiz):
        assert metric.per_sample(*one(answers, "dog")) == [pytest.approx(accuracy, abs=1e-12)]


def test_the_evaluations_differ_where_all_people_say_the_same_or_spell_it_oddly():
    """(prediction, answers) -> vqa, vqa_open_flamingo, vqa_textvqa, vqa_vizwiz."""
    table = [
        ("Yes.", ["yes"] * 10, (0, 1, 1, 1)),
        ("yes\n", [" yes\t"] * 10, (1, 1, 1, 0)),
        ("Yes.", ["yes"] * 9 + ["no"], (1, 1, 1, 1)),
        ("two", ["2."] * 9 + ["3"], (1, 1, 1, 0)),
        ("joe s", ["joe's"] * 9 + ["bar"], (0, 0, 0, 0)),
        ("joe 's", ["joe's"] * 9 + ["bar"], (0, 0, 1, 0)),
        ("1000 t-shirts", ["1,000 t-shirts"] * 9 + ["2"], (0, 0, 1, 0)),
    ]
    for text, answers, wanted in table:
        found = [m.accuracy(text, answers) for m in (vqa, vqa_open_flamingo, vqa_textvqa, vqa_vizwiz)]
        assert found == pytest.approx(wanted), (text, answers)


def test_gqa_wants_the_answer_letter_for_letter():
    assert [gqa.accuracy(text, ["left"]) for text in ("left", "Left", "left.", "le")] == [1, 0, 0, 0]


@pytest.mark.parametrize("name", ["vqa", "vqa_open_flamingo", "vqa_textvqa", "vqa_vizwiz", "gqa"])
def test_the_value_is_the_mean_and_questions_without_answers_are_not_scored(name: str):
    metric = metrics.load(name)
    examples = [Example(str(n), Path("1.jpg"), "?", ("left",) * 10) for n in range(4)]
    predictions = [Prediction(str(n), "left" if n else "right") for n in range(4)]
    assert metric.value(predictions, examples) == pytest.approx(0.75)
    assert metric.per_sample(predictions, examples) == pytest.approx([0, 1, 1, 1])
    examples[2] = Example("2", Path("1.jpg"))
    assert metric.per_sample(predictions, examples) is None
    with pytest.raises(ValueError, match="1 of 4 questions have no answers.*first is 2.*--split"):
        metric.value(predictions, examples)
    with pytest.raises(ValueError):
        metric.per_sample(predictions, examples[:2])


# Against the code that made the published figures.


@pytest.fixture(scope="module")
def oracle() -> Any:
    """OpenFlamingo's vqa_metric.py, a copy of the official code; its package is not imported."""
    spec = importlib.util.find_spec("open_flamingo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs pip install --no-deps open-flamingo==2.0.1")
    path = Path(spec.submodule_search_locations[0]) / "eval" / "vqa_metric.py"
    file = importlib.util.spec_from_file_location("open_flamingo_vqa_metric", path)
    assert file and file.loader
    module = importlib.util.module_from_spec(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in its patterns
        file.loader.exec_module(module)
    return module


def text_of(draw: random.Random, words: Sequence[str]) -> str:
    """One to five odd words, marks within them or between them."""
    marks = [*_vqa.PUNCTUATION, ".", "..", "'", ":", "$", ",", "."]
    parts = []
    for _ in range(draw.choice([1, 1, 2, 3, 5])):
        word = draw.choice(words)
        word = draw.choice([word, word, word.upper(), word.capitalize()])
        place = draw.randrange(len(word) + 1)
        parts.append(draw.choice([word, word, word[:place] + draw.choice(marks) + word[place:]]))
        parts.append(draw.choice([" "] * 6 + ["\n", "\t", "  ", "", *draw.sample(marks, 2)]))
    return "".join(parts) + draw.choice([""] * 9 + ["." * 40])


def questions(oracle: Any, count: int) -> list[tuple[str, list[str]]]:
    """(prediction, ten answers), seeded: spellings of few texts, so that many agree."""
    draw = random.Random(6)
    table = oracle.VQAEval(None, None)
    words = [*table.contractions, *table.contractions.values(), *table.manualMap, *table.articles]
    words += ["dog", "t-shirt", "1,000", "3.5", ".5", "10:30", "red/white", "u.s.", "1", "2", "0", "joe's"]
    made = []
    for number in range(count):
        base = [text_of(draw, words) for _ in range(draw.choice([1, 1, 2, 3, 8]))]
        spelt = [oracle_text(table, base[0]), f"{base[0]}.", f"the {base[0]}", f" {base[0]}\n"]
        said = base[:1] if number % 4 == 0 else base + spelt  # of every fourth, all people say the same
        answers = [draw.choice(said) for _ in range(10)]
        made.append((draw.choice([*base, *spelt, text_of(draw, words)]), answers))
    return made


def oracle_text(table: Any, text: str) -> str:
    return table.processDigitArticle(table.processPunctuation(text))


Reference = Callable[[Any, str, list[str]], float]


def official(table: Any, text: str, answers: list[str]) -> float:
    """The current official rule, on the oracle's normalisation."""

    def clean(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    given, said = [clean(answer) for answer in answers], clean(text)
    if len(set(given)) > 1:
        given, said = [oracle_text(table, answer) for answer in given], oracle_text(table, said)
    return leave_one_out(given, said)


def textvqa(table: Any, text: str, answers: list[str]) -> float:
    def clean(text: str) -> str:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        return oracle_text(table, text.replace("\n", " ").replace("\t", " ").strip())

    return leave_one_out([clean(answer) for answer in answers], clean(text))


def vizwiz(table: Any, text: str, answers: list[str]) -> float:
    return leave_one_out(answers, oracle_text(table, text.replace("\n", " ").replace("\t", " ").strip()))


def leave_one_out(answers: list[str], text: str) -> float:
    people = list(enumerate(answers))
    others = [[a for other, a in people if other != person] for person, _ in people]
    return sum(min(1, sum(a == text for a in rest) / 3) for rest in others) / len(people)


def test_three_thousand_texts_are_normalised_as_the_official_code_does(oracle: Any):
    table = oracle.VQAEval(None, None)
    texts = [text for said, answers in questions(oracle, 300) for text in (said, *answers)]
    assert len(texts) >= 3000
    wrong = [(t, _vqa.normalised(t), oracle_text(table, t)) for t in texts]
    assert not [each for each in wrong if each[1] != each[2]]


def test_the_tables_are_the_official_ones(oracle: Any):
    table = oracle.VQAEval(None, None)
    reached = {k: v for k, v in table.contractions.items() if k == k.lower() and k != v}
    assert reached == _vqa.CONTRACTIONS
    assert table.manualMap == _vqa.NUMBERS
    assert set(table.articles) == _vqa.ARTICLES
    assert table.punct == list(_vqa.PUNCTUATION)


def test_open_flamingos_evaluation_gives_the_same_accuracy_of_1500_answers(oracle: Any, capsys):
    asked = questions(oracle, 1500)
    scores = oracle.VQAEval(Answered(asked), Answered([(text, []) for text, _ in asked]), n=12)
    scores.evaluate()
    capsys.readouterr()  # its progress bar
    examples = [Example(str(n), Path("1.jpg"), "?", tuple(answers)) for n, (_, answers) in enumerate(asked)]
    predictions = [Prediction(str(n), text) for n, (text, _) in enumerate(asked)]
    found = vqa_open_flamingo.per_sample(predictions, examples)
    assert found is not None
    assert [100 * each for each in found] == pytest.approx(list(scores.evalQA.values()), abs=1e-9)
    assert len({round(each, 6) for each in found}) == 5  # 0, 0.3, 0.6, 0.9, 1: all occur
    overall = vqa_open_flamingo.value(predictions, examples)
    assert 100 * overall == pytest.approx(scores.accuracy["overall"], abs=1e-9)


@pytest.mark.parametrize("metric, reference", [(vqa, official), (vqa_textvqa, textvqa), (vqa_vizwiz, vizwiz)])
def test_the_other_evaluations_give_the_same_accuracy_of_1500_answers(
    oracle: Any, metric: Any, reference: Reference
):
    table = oracle.VQAEval(None, None)
    asked = questions(oracle, 1500)
    wanted = [reference(table, text, list(answers)) for text, answers in asked]
    assert [metric.accuracy(text, answers) for text, answers in asked] == pytest.approx(wanted, abs=1e-12)
    assert len({round(each, 6) for each in wanted}) == 5


def test_generated_text_is_cut_as_open_flamingo_cuts_it(oracle: Any):
    draw = random.Random(7)
    pieces = ["Question", "Answer", "Short", ", ", ",", " ", "\n", ".", "a question", "red", "t-shirt", ":"]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(8))) for _ in range(1000)]
    wanted = [oracle.postprocess_vqa_generation(text).strip() for text in texts]  # scoring strips it
    assert [benchmark.cut(text) for text in texts] == wanted


class Answered:
    """What the oracle reads questions, answers and predictions from."""

    def __init__(self, asked: Sequence[tuple[str, list[str]]]):
        kinds = {"question_type": "", "answer_type": ""}
        self.qa = {
            number: {
                "answer": text,
                "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers)],
                **kinds,
            }
            for number, (text, answers) in enumerate(asked)
        }

    def getQuesIds(self) -> list[int]:
        return list(self.qa)
