"""Two evaluations of one benchmark, query by query: which differences are more than chance.

Answers to the same query, in the same setting with the same seed, are pairs. Scores are computed again
from the answers, on the queries of both, so that both are scored by the same code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from flamingo.eval.few_shot import Setting
from flamingo.eval.results import statistics
from flamingo.eval.results.reading import Evaluation, Records, per_query, sides
from flamingo.eval.results.statistics import Clusters, Interval

SIGNIFICANT = 0.05
SWAPS, SWAP_SAMPLES = 999, 1_000_000  # of metrics of the whole; predictions computed in all bound their time
CHANGED = 6  # queries shown of each direction
TESTS = {
    "mcnemar": "exact McNemar test",
    "sign_flips": "paired permutation test",
    "swaps": "permutation test that swaps the two answers to a query",
}


@dataclass
class Pair:
    """One setting in both.

    Attributes:
        one, other: scores on the queries of both; difference: other - one, with its 95 % interval.
        n: queries; seeds: of both. won, lost: queries that the other, the one, scored higher.
        p: of `test`; p_holm: for all settings together. more_than_chance: p_holm below 0.05.
        changed: queries with the largest differences, of each direction. control: as in Setting.
    """

    name: str
    one: float
    other: float
    difference: float
    interval: Interval
    n: int
    seeds: int
    won: int | None
    lost: int | None
    test: str
    p: float
    changed: list[dict[str, Any]]
    p_holm: float = 1.0
    control: str | None = None

    @property
    def more_than_chance(self) -> bool:
        return self.p_holm < SIGNIFICANT


def compare(one: Path, other: Path, out: Path | None = None) -> str:
    """Write eval-compare.html and eval-compare.json into `out`, or the first folder; the table as text.

    Raises ValueError for folders that hold no finished evaluation, other benchmarks, splits or
    metrics, no common setting, no common query, or common queries with other reference answers.
    """
    left, right = Evaluation.read(one), Evaluation.read(other)
    _check_alike(left, right)
    pairs = [pair for name in _common(left, right) if (pair := _pair(left, right, name))]
    for pair in pairs:
        pair.control = left.named(pair.name)[0].control
    if not pairs:
        raise ValueError(
            f"{one} and {other} have no query in common that has a score: take the same limit and seed"
        )
    for pair, adjusted in zip(pairs, statistics.holm([pair.p for pair in pairs]), strict=True):
        pair.p_holm = adjusted
    folder = out or one
    folder.mkdir(parents=True, exist_ok=True)
    found = described(left, right, pairs)
    (folder / "eval-compare.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    (folder / "eval-compare.html").write_text(_page(found), encoding="utf-8")
    return f"{table(left, pairs)}\n{folder / 'eval-compare.html'}"


# ---- pairs ---------------------------------------------------------------------------------------


def _check_alike(one: Evaluation, other: Evaluation) -> None:
    for what in ("benchmark", "split"):
        a, b = one.figures[what], other.figures[what]
        if a.replace("-", "_") != b.replace("-", "_"):
            raise ValueError(
                f"{one.folder} is of {what} {a!r}, {other.folder} of {b!r}: only answers to the same "
                "questions can be compared"
            )
    a, b = (side.figures["metrics"][0]["name"] for side in (one, other))
    if a != b:
        raise ValueError(f"{one.folder} is scored by {a}, {other.folder} by {b}: evaluate one of them again")


def _common(one: Evaluation, other: Evaluation) -> list[str]:
    """Names of the settings of both, in the first's order."""
    names = [[setting["name"] for setting in side.figures["settings"]] for side in (one, other)]
    if found := [name for name in names[0] if name in names[1]]:
        return found
    raise ValueError(
        f"{one.folder} has {', '.join(names[0])}; {other.folder} has {', '.join(names[1])}: "
        "no setting in common; evaluate one of them with the other's --shots"
    )


def _pair(one: Evaluation, other: Evaluation, name: str) -> Pair | None:
    """None where the two have no query in common, or none has a published answer."""
    seeds: dict[int, list[Setting]] = {}
    for side in (one, other):
        for setting in side.named(name):
            seeds.setdefault(setting.seed, []).append(setting)
    left, right = [], []
    for settings in seeds.values():
        if len(settings) == 2:
            a, b = one.records(settings[0]), other.records(settings[1])
            common = [query for query in a if query in b]
            _check_answers(one, other, [(a[query], b[query]) for query in common])
            if common and all(a[query]["answers"] for query in common):
                left.append({query: a[query] for query in common})
                right.append({query: b[query] for query in common})
    if not left:
        return None
    values = [[per_query(one.metric, records) for records in side] for side in (left, right)]
    if any(each is None for side in values for each in side):
        return _pair_of_whole(one.metric, name, left, right)
    return _pair_of_queries(name, left, right, values)


def _check_answers(one: Evaluation, other: Evaluation, pairs: Sequence[tuple[dict, dict]]) -> None:
    differ = [a["id"] for a, b in pairs if a["answers"] != b["answers"] or a["question"] != b["question"]]
    if differ:
        raise ValueError(
            f"{one.folder} and {other.folder} have other questions or reference answers under the same id, "
            f"{len(differ)} times, the first is {differ[0]!r}: they were made with other data"
        )


def _pair_of_queries(name: str, left: list[Records], right: list[Records], values: Any) -> Pair:
    """Of a metric that each query has a value of."""
    differences = [{q: b[q] - a[q] for q in a} for a, b in zip(*values, strict=True)]
    one, other, change = (Clusters.of(each) for each in (*values, differences))
    lost, won = int((change.sums < -1e-9).sum()), int((change.sums > 1e-9).sum())
    if len(left) == 1 and one.binary and other.binary:
        test, p = "mcnemar", statistics.mcnemar(lost, won)
    else:
        test, p = "sign_flips", statistics.sign_flips(change)
    return Pair(
        name=name,
        one=one.mean,
        other=other.mean,
        difference=change.mean,
        interval=statistics.percentiles(statistics.bootstrap(change)),
        n=len(change.sums),
        seeds=len(left),
        won=won,
        lost=lost,
        test=test,
        p=p,
        changed=_changed(left[0], right[0], differences[0]),
    )


def _changed(left: Records, right: Records, differences: dict[str, float]) -> list[dict[str, Any]]:
    order = sorted(differences, key=lambda query: -abs(differences[query]))
    ways = [[q for q in order if way * differences[q] > 1e-9][:CHANGED] for way in (1, -1)]
    return [
        {
            "id": query,
            "question": left[query]["question"],
            "answers": list(dict.fromkeys(left[query]["answers"]))[:3],
            "one": left[query]["prediction"],
            "other": right[query]["prediction"],
            "difference": differences[query],
        }
        for way in ways
        for query in way
    ]


def _pair_of_whole(metric: Any, name: str, left: list[Records], right: list[Records]) -> Pair | None:
    """Of a metric that only the whole has (ROC-AUC); None where it has no value."""
    queries = list(dict.fromkeys(query for records in left for query in records))
    places = [{q: i for i, q in enumerate(records)} for records in left]
    prepared = [(sides(list(a.values())), sides(list(b.values()))) for a, b in zip(left, right, strict=True)]

    def both(drawn: Sequence[int], swapped: Sequence[bool]) -> tuple[float, float]:
        """Scores over queries drawn, with the two answers to some swapped."""
        found: tuple[list[float], list[float]] = ([], [])
        for at, ((a, examples), (b, _)) in zip(places, prepared, strict=True):
            rows = [
                (at[queries[q]], swap) for q, swap in zip(drawn, swapped, strict=True) if queries[q] in at
            ]
            asked = [examples[i] for i, _ in rows]
            for side, (mine, theirs) in enumerate(((a, b), (b, a))):
                said = [theirs[i] if swap else mine[i] for i, swap in rows]
                found[side].append(metric.value(said, asked) if rows else math.nan)
        return fmean(found[0]), fmean(found[1])

    everything, kept = range(len(queries)), [False] * len(queries)
    one, other = both(everything, kept)

    def difference(drawn: Sequence[int]) -> float:
        a, b = both(drawn, [False] * len(drawn))
        return b - a

    span = statistics.interval_of_whole(difference, len(queries), other - one, 2 * len(left))
    if not math.isfinite(other - one) or not math.isfinite(span[0]):
        return None
    return Pair(
        name=name,
        one=one,
        other=other,
        difference=other - one,
        interval=span,
        n=len(queries),
        seeds=len(left),
        won=None,
        lost=None,
        test="swaps",
        p=_swaps(both, len(queries), len(left), other - one),
        changed=[],
    )


def _swaps(both: Callable[..., tuple[float, float]], queries: int, seeds: int, observed: float) -> float:
    random, everything = np.random.default_rng(0), range(queries)
    swaps = max(99, min(SWAPS, SWAP_SAMPLES // (2 * queries * seeds)))
    as_far = 0
    for _ in range(swaps):
        a, b = both(everything, (random.random(queries) < 0.5).tolist())
        as_far += abs(b - a) >= abs(observed) - 1e-12
    return (1 + as_far) / (1 + swaps)


# ---- what is told --------------------------------------------------------------------------------


def described(one: Evaluation, other: Evaluation, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What eval-compare.json holds."""
    first = one.figures["metrics"][0]
    configs = [{**side.figures["config"], "model": side.figures.get("model")} for side in (one, other)]
    names = [name for name in configs[0] if configs[0][name] != configs[1].get(name)]
    return {
        "title": one.figures["title"],
        "benchmark": one.figures["benchmark"],
        "split": one.figures["split"],
        "metric": first,
        "folders": [str(one.folder), str(other.folder)],
        "same_model": one.figures["fingerprint"] == other.figures["fingerprint"],
        "settings_that_differ": {name: [config.get(name) for config in configs] for name in names},
        "left_out": sorted(
            {s["name"] for side in (one, other) for s in side.figures["settings"]} - {p.name for p in pairs}
        ),
        "headline": headline(pairs, first["scale"]),
        "pairs": [
            {**asdict(pair), "more_than_chance": pair.more_than_chance, "test": TESTS[pair.test]}
            for pair in pairs
        ],
    }


def headline(pairs: Sequence[Pair], scale: float) -> str:
    """Which differences are more than chance, in a sentence; of controls only where there are no others."""
    found = [p for p in pairs if p.more_than_chance]
    pairs = [p for p in found if not p.control] or found
    better = [p for p in pairs if p.difference > 0]
    worse = [p for p in pairs if p.difference < 0]
    said = [
        f"{way} {', '.join(f'{p.name} ({scale * p.difference:+.1f})' for p in found)}"
        for way, found in (("better at", better), ("worse at", worse))
        if found
    ]
    if not said:
        return "No difference is more than chance."
    return f"B is {' and '.join(said)}: more than chance."


def table(one: Evaluation, pairs: Sequence[Pair]) -> str:
    """The comparison as lines of text; A is the first, B the second."""
    first = one.figures["metrics"][0]
    scale = first["scale"]
    wide = max(len(pair.name) for pair in pairs)
    lines = [
        f"{one.figures['title']}, {first['title']}: B - A, 95 % interval, p of all settings together (Holm)",
        f"{'':{wide}} {'A':>7} {'B':>7} {'B - A':>7}  {'interval':^16}  {'p':>7}  {'queries':>8}",
    ]
    for pair in pairs:
        low, high = (scale * bound for bound in pair.interval)
        span = f"{low:+.2f} to {high:+.2f}"
        lines.append(
            f"{pair.name:{wide}} {scale * pair.one:7.2f} {scale * pair.other:7.2f} "
            f"{scale * pair.difference:+7.2f}  {span:^16}  {small(pair.p_holm):>7}  {pair.n:>8,}  "
            + ("more than chance" if pair.more_than_chance else "may be chance")
        )
    return "\n".join([*lines, headline(pairs, scale)])


def small(p: float) -> str:
    """0.0312 -> 0.031; what is smaller still by its order."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}" if p > 1e-99 else "<1e-99"


def _page(found: dict[str, Any]) -> str:
    from flamingo.eval.results.page import environment

    made = environment()
    made.filters["small"] = small
    return made.get_template("compare.html.jinja").render(found=found, shown=CHANGED)
