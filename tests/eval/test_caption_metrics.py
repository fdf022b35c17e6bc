"""Caption metrics without Java against pycocoevalcap's, with it: tokens, CIDEr-D, BLEU, ROUGE-L."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from flamingo.eval import metrics
from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _bleu, _captions, _ptb, bleu, cider, rouge_l
from tests.eval.fixtures_caption_metrics import ODD, made, odd, plain


def sides(predictions: Sequence[Prediction], examples: Sequence[Example]) -> tuple[dict, dict]:
    """References and captions as pycocoevalcap takes them, as tokens."""
    references = {e.id: [_ptb.tokenize(a) for a in e.answers] for e in examples}
    return references, {p.id: [_ptb.tokenize(p.text)] for p in predictions}


@pytest.fixture(scope="module")
def pycocoevalcap() -> ModuleType:
    return pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")


@pytest.fixture(scope="module")
def java(pycocoevalcap: ModuleType) -> ModuleType:
    if shutil.which("java") is None:
        pytest.skip("there is no Java to run PTBTokenizer with")
    return pycocoevalcap


def official(captions: Sequence[str], between: str = "") -> list[str]:
    """Tokens by pycocoevalcap's own tokenizer; between: a caption that follows each."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    told = {
        at: [{"caption": each} for each in (caption, between) if each] for at, caption in enumerate(captions)
    }
    return [found[0] for found in PTBTokenizer().tokenize(told).values()]


def differing(captions: Sequence[str], tokens: Sequence[str]) -> list[tuple[str, str, str]]:
    found = zip(captions, map(_ptb.tokenize, captions), tokens, strict=True)
    return [(caption, ours, theirs) for caption, ours, theirs in found if ours != theirs]


@pytest.mark.parametrize("caption, tokens", ODD, ids=range(len(ODD)))
def test_odd_captions_have_the_tokens_that_java_gives_them(caption: str, tokens: str):
    assert _ptb.tokenize(caption) == tokens


def test_plain_captions_have_the_tokens_of_java(java: ModuleType):
    rng = random.Random(1)
    captions = [plain(rng) for _ in range(3000)]
    assert not differing(captions, official(captions))


def test_odd_captions_of_all_kinds_have_the_tokens_of_java(java: ModuleType):
    rng = random.Random(2)
    captions = [caption for caption in (odd(rng) for _ in range(6000)) if caption.strip()]
    assert len(captions) > 5900
    assert not differing(captions, official(captions, between="A dog"))


def test_a_caption_does_not_depend_on_the_next_as_it_does_in_java(java: ModuleType):
    captions = ["there is a fig.", "3 dogs", "they have a plan B.", "two dogs"]
    assert [_ptb.tokenize(c) for c in captions] == [
        "there is a fig",
        "3 dogs",
        "they have a plan b",
        "two dogs",
    ]
    assert official(captions) == ["there is a fig.", "3 dogs", "they have a plan b.", "two dogs"]


def test_line_breaks_are_blanks_and_what_is_no_character_is_dropped():
    assert _ptb.tokenize("a dog\nruns\r\nto\u2028me") == "a dog runs to me"
    assert _ptb.tokenize("a \U0001f600\udc00dog\x07") == "a dog"
    assert _ptb.tokenize("x@\U0001f600.com") == "x@\U0001f600.com"


LONG = [
    piece * (15_000 // len(piece))
    for piece in [
        "a",
        "a.",
        "a-",
        ".",
        "1,",
        "a@",
        "d'",
        "A&",
        "a/",
        "&eacute;",
        "a.com/",
        "(",
        "'",
        "_-",
        "1 ",
    ]
]
LONG += ["<a " + "b=c " * 3_000, "www." + "a.com/" * 3_000 + ".", "http://" + "." * 15_000]


@pytest.mark.parametrize("text", LONG, ids=[text[:10] for text in LONG])
def test_texts_that_could_make_patterns_try_for_ever_are_tokenized_at_once(text: str):
    tokens = _ptb.tokenize(text)
    assert sum(map(str.isalnum, tokens)) >= sum(map(str.isalnum, text)), "no letter is lost"


def test_cider_is_pycocoevalcaps(pycocoevalcap: ModuleType):
    from pycocoevalcap.cider.cider import Cider

    predictions, examples = made(1200, seed=3)
    mean, each = Cider().compute_score(*sides(predictions, examples))
    assert cider.per_sample(predictions, examples) == pytest.approx(list(each), abs=1e-9)
    assert cider.value(predictions, examples) == pytest.approx(mean, abs=1e-9)
    assert 0.3 < mean < 9


def test_bleu_is_pycocoevalcaps(pycocoevalcap: ModuleType):
    from pycocoevalcap.bleu.bleu import Bleu

    predictions, examples = made(1200, seed=4)
    whole, each = Bleu(4).compute_score(*sides(predictions, examples), verbose=0)
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu")
    assert [metrics.load(n).value(predictions, examples) for n in names] == pytest.approx(whole, abs=1e-9)
    ours = list(zip(*_bleu.of_each(_captions.said(predictions, examples)), strict=True))
    for order in range(4):
        assert ours[order] == pytest.approx(each[order], abs=1e-9)
    assert bleu.per_sample(predictions, examples) is None


def test_rouge_l_is_pycocoevalcaps(pycocoevalcap: ModuleType):
    from pycocoevalcap.rouge.rouge import Rouge

    predictions, examples = made(1200, seed=5)
    mean, each = Rouge().compute_score(*sides(predictions, examples))
    assert rouge_l.per_sample(predictions, examples) == pytest.approx(list(each), abs=1e-9)
    assert rouge_l.value(predictions, examples) == pytest.approx(mean, abs=1e-9)


def test_a_whole_evaluation_is_the_official_one_from_raw_captions(java: ModuleType):
    """Java's tokens, all captions in one file as there, and the official scorers."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rng = random.Random(6)
    examples = [
        Example(str(n), Path("1.jpg"), answers=tuple(plain(rng) for _ in range(5))) for n in range(1000)
    ]
    predictions = [Prediction(e.id, rng.choice([plain(rng), e.answers[0][:-3]])) for e in examples]
    references = PTBTokenizer().tokenize({e.id: [{"caption": a} for a in e.answers] for e in examples})
    captions = PTBTokenizer().tokenize({p.id: [{"caption": p.text}] for p in predictions})
    for scorer, names in (
        (Cider(), ["cider"]),
        (Rouge(), ["rouge_l"]),
        (Bleu(4), ["bleu_1", "", "", "bleu"]),
    ):
        whole = scorer.compute_score(references, captions)[0]
        for name, theirs in zip(names, whole if isinstance(whole, list) else [whole], strict=True):
            if name:
                assert metrics.load(name).value(predictions, examples) == pytest.approx(theirs, abs=1e-9)


def test_figures_that_can_be_checked_by_hand():
    pictures = [("a dog runs", "a dog runs"), ("a cat", "a cat sits on a mat")]
    predictions = [Prediction(str(n), said) for n, (said, _) in enumerate(pictures)]
    examples = [Example(str(n), Path("1.jpg"), answers=(ref,)) for n, (_, ref) in enumerate(pictures)]
    # The same words: cosine 1 for n of 1 to 3, and no n-gram of 4.
    assert cider.per_sample(predictions, examples)[0] == pytest.approx(7.5)  # type: ignore[index]
    # 5 of 5 tokens are found, 9 were wanted: exp(1 - 9 / 5).
    assert metrics.load("bleu_1").value(predictions, examples) == pytest.approx(0.4493290, abs=1e-6)
    # Precision 1, recall 2 of 6: (1 + 1.44) / 3 / (1 / 3 + 1.44).
    assert rouge_l.per_sample(predictions, examples) == pytest.approx([1.0, 0.4586466], abs=1e-6)


def test_cider_of_one_picture_is_none_of_its_own():
    """IDF of one picture is 0, so is every value: it is known with the others only."""
    predictions, examples = made(1, seed=7)
    assert cider.per_sample(predictions, examples) == [0.0]
    assert cider.ALONE is False


def test_longest_common_subsequences_of_random_texts_are_those_of_the_plain_recursion():
    rng = random.Random(8)

    def slow(a: str, b: str) -> int:
        row = [0] * (len(b) + 1)
        for x in a:
            before = row[:]
            for at, y in enumerate(b):
                row[at + 1] = before[at] + 1 if x == y else max(row[at], before[at + 1])
        return row[-1]

    for _ in range(300):
        a, b = ("".join(rng.choices("abcd", k=rng.randint(0, 70))) for _ in range(2))
        assert rouge_l.longest_common(list(a), list(b)) == slow(a, b)


@pytest.mark.parametrize(
    "name", ["cider", "bleu", "bleu_1", "bleu_2", "bleu_3", "rouge_l", "meteor", "spice"]
)
def test_pictures_without_references_have_no_value(name: str):
    metric = metrics.load(name)
    examples = [Example("7", Path("7.jpg"))]
    assert metric.per_sample([Prediction("7", "a dog")], examples) is None
    with pytest.raises(ValueError, match="1 of 1 pictures have no reference captions, the first is 7"):
        metric.value([Prediction("7", "a dog")], examples)
    with pytest.raises(ValueError, match="no captions to score"):
        metric.value([], [])
