"""What the controls say, in sentences: what pictures are worth, and whether answers are copied.

A control is held against the plain setting on the same queries, pair by pair. A difference is called one
when the permutation test says so at 5 %; where the two have no query in common, or no value of a single
query, when their 95 % intervals lie apart, which is stricter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flamingo.eval import findings
from flamingo.eval.results.reading import Evaluation, Records, per_query
from flamingo.eval.results.statistics import Clusters, Interval, bootstrap, percentiles, sign_flips
from flamingo.eval.results.summary import copies

SIGNIFICANT = 0.05
SAID: dict[str, dict[int, str]] = {
    "blank": {
        1: "Blanking every picture costs {cost}: the answers depend on the pictures.",
        0: "Blanking every picture changes nothing measurable ({cost}): nothing here shows that it looks.",
        -1: "With every picture blanked it scores {cost} more: the pictures mislead it.",
    },
    "text_only_shots": {
        1: "Shots without their pictures cost {cost}: it takes something from the pictures of shots.",
        0: "Shots without their pictures change nothing measurable ({cost}): nothing here shows that it "
        "takes more from shots than their text.",
        -1: "Shots without their pictures score {cost} more: the pictures of shots are in its way.",
    },
    "shuffled_shots": {
        1: "Shots with each other's pictures cost {cost}: it uses which picture belongs to which answer.",
        0: "Shots with each other's pictures change nothing measurable ({cost}): nothing here shows that "
        "it uses which picture belongs to which answer.",
        -1: "Shots with each other's pictures score {cost} more: it does not learn from which picture "
        "belongs to which answer.",
    },
}


@dataclass(frozen=True)
class Control:
    """A control beside the setting that it changes.

    Attributes:
        value, plain: scores on the queries that both were asked; plain None: that setting was not asked.
        cost: plain - value, with its interval, None where they are no pairs; n: queries in pairs.
        verdict: 1 the control costs, -1 it gains, 0 no difference that is more than chance.
    """

    name: str
    control: str
    shots: int
    value: float
    plain: float | None = None
    cost: float | None = None
    interval: Interval | None = None
    n: int = 0
    verdict: int = 0

    def sentence(self, scale: float) -> str:
        if self.plain is None:
            return (
                f"{self.shots} shots as they are were not asked, so there is nothing to hold this against: "
                f"add --shots {self.shots}."
            )
        assert self.cost is not None
        way = self.verdict or 1
        cost = f"{scale * way * self.cost:.1f} points"
        if self.interval:
            low, high = sorted(scale * way * bound for bound in self.interval)
            cost += f" ({low:.1f} to {high:.1f})" if self.verdict else f", {low:.1f} to {high:.1f}"
        return SAID[self.control][self.verdict].format(cost=cost)


@dataclass(frozen=True)
class Copying:
    """How often an answer is one of its own shots', beside how often the right answer is among them.

    there: None where no answers are published. verdict: 1 more often than that, -1 less often, 0 neither.
    """

    name: str
    share: float
    there: float | None
    n: int
    verdict: int

    def sentence(self) -> str:
        share = findings.percent(self.share)
        if self.there is None:
            return f"{self.name}: {share} of its answers are one of its shots' answers."
        there = findings.percent(self.there)
        return (
            f"{self.name}: {share} of its answers are one of its shots' answers; "
            + {
                1: f"the right one is among them in only {there}: it parrots its shots.",
                0: f"the right one is among them in {there}: no more copying than right answers bring.",
                -1: f"the right one is among them in {there}: it copies less than would be right.",
            }[self.verdict]
        )


def controls(evaluation: Evaluation) -> list[Control]:
    """All controls that have a score."""
    name = evaluation.figures["metrics"][0]["name"]
    scored = [s for s in evaluation.figures["settings"] if name in s["metrics"]]
    plain = {setting["shots"]: setting for setting in scored if not setting["control"]}
    return [_control(evaluation, s, plain.get(s["shots"]), name) for s in scored if s["control"]]


def _control(
    evaluation: Evaluation, setting: Mapping[str, Any], plain: Mapping[str, Any] | None, metric: str
) -> Control:
    figures = setting["metrics"][metric]
    known = {"name": setting["name"], "control": setting["control"], "shots": setting["shots"]}
    if plain is None:
        return Control(**known, value=figures["value"])
    beside = plain["metrics"][metric]
    before = [evaluation.records(each) for each in evaluation.named(plain["name"])]
    after = [evaluation.records(each) for each in evaluation.named(setting["name"])]
    if found := paired(evaluation.metric, before, after):
        one, other, differences = found
        span = percentiles(bootstrap(differences))
        verdict = sign(differences.mean) if sign_flips(differences) < SIGNIFICANT else 0
        n = len(differences.sums)
        return Control(**known, value=other, plain=one, cost=one - other, interval=span, n=n, verdict=verdict)
    verdict = findings.compare(beside["interval"], figures["interval"])
    cost = beside["value"] - figures["value"]
    return Control(**known, value=figures["value"], plain=beside["value"], cost=cost, verdict=verdict)


def paired(metric: Any, one: list[Records], other: list[Records]) -> tuple[float, float, Clusters] | None:
    """(score of one, of the other, one - other by query) on the queries of both, seed by seed.

    None where less than half of the other's are the one's too, or a metric has no value of one query.
    """
    left, right = [], []
    for before, after in zip(one, other, strict=True):
        common = [query for query in after if query in before]
        if 2 * len(common) < len(after):
            return None
        values = [per_query(metric, {q: side[q] for q in common}) for side in (before, after)]
        if values[0] is None or values[1] is None:
            return None
        left.append(values[0])
        right.append(values[1])
    differences = [{q: a[q] - b[q] for q in a} for a, b in zip(left, right, strict=True)]
    return Clusters.of(left).mean, Clusters.of(right).mean, Clusters.of(differences)


def sign(value: float) -> int:
    return int(value > 0) - int(value < 0)


def copying(evaluation: Evaluation) -> list[Copying]:
    """Of the plain settings whose shots have pictures."""
    found = []
    for setting in evaluation.figures["settings"]:
        if setting["control"] or not setting["shots"] or setting["copied"] is None:
            continue
        seeds = [evaluation.records(each) for each in evaluation.named(setting["name"])]
        copied = Clusters.of([{q: float(copies(r)) for q, r in records.items()} for records in seeds])
        there = [{q: float(answer_is_there(r)) for q, r in records.items()} for records in seeds]
        if not all(record["answers"] for records in seeds for record in records.values()):
            found.append(Copying(setting["name"], copied.mean, None, len(copied.sums), 0))
            continue
        more = Clusters.of(
            [
                {q: float(copies(r)) - right[q] for q, r in records.items()}
                for records, right in zip(seeds, there, strict=True)
            ]
        )
        verdict = sign(more.mean) if sign_flips(more) < SIGNIFICANT else 0
        right = Clusters.of(there).mean
        found.append(Copying(setting["name"], copied.mean, right, len(copied.sums), verdict))
    return found


def answer_is_there(record: Mapping[str, Any]) -> bool:
    """Whether the commonest reference answer is the answer of one of the shots, but for case."""
    answers = Counter(answer.strip().lower() for answer in record["answers"])
    if not answers:
        return False
    return answers.most_common(1)[0][0] in {shot["answer"].strip().lower() for shot in record["shots"]}
