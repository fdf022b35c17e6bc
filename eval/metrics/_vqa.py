"""VQA accuracy: how answers are normalised, and how a prediction is held against ten people's answers.

The rules are those of the official evaluation of VQA (Antol et al. 2015, section 3; Goyal et al. 2017),
with what it does to odd texts, since published figures were made with it. Who normalises what, and when,
differs between evaluations, so each has its own metric: vqa, vqa_open_flamingo, vqa_textvqa, vqa_vizwiz.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from flamingo.eval.benchmarks import Example, Prediction

SCALE = 100.0
Rule = Callable[[str, Sequence[str]], float]  # of a prediction and all answers: 0 to 1

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # that are dropped at most; the official call passes re.UNICODE, which is 32, as a count
DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
SPELLINGS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
you'd you'd've you'll you're you've
"""


# One apostrophe forgotten, each in turn.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in SPELLINGS.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round, as official


def one_line(text: str) -> str:
    """Line breaks and tabs are blanks; none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str) -> str:
    """Each mark is dropped where it stands next to a blank anywhere in the text, or where any comma stands
    between digits; else it becomes a blank. Full stops go, but before a digit."""
    joined = DIGITS_AROUND_COMMA.search(text) is not None
    kept = text
    for mark in PUNCTUATION:
        dropped = joined or f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if dropped else " ")
    return PERIOD.sub("", kept, count=PERIODS)


def plain_words(text: str) -> str:
    """Lower case; small numbers as digits, no articles, apostrophes where they were forgotten."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalised(text: str) -> str:
    return plain_words(without_punctuation(text))


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean, over the people, of min(1, how many of the others gave this answer / 3)."""
    same = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def per_sample(
    rule: Rule, predictions: Sequence[Prediction], examples: Sequence[Example]
) -> list[float] | None:
    """The rule's accuracy of each prediction; None where an example has no answers to hold it against, as
    in test splits whose answers are not published: its prediction is kept without a score."""
    if not all(example.answers for example in examples):
        return None
    return [rule(p.text, e.answers) for p, e in zip(predictions, examples, strict=True)]


def value(rule: Rule, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean. Raises ValueError where answers are missing."""
    scores = per_sample(rule, predictions, examples)
    if scores is None:
        raise no_answers(examples)
    return sum(scores) / len(scores)


def no_answers(examples: Sequence[Example]) -> ValueError:
    without = [example for example in examples if not example.answers]
    return ValueError(
        f"{len(without)} of {len(examples)} questions have no answers to score against, the first is "
        f"{without[0].id}: the answers of this split are not published. The predictions are kept, one line "
        "each, in the answers folder, to be sent to the benchmark's server; choose another --split to score"
    )
