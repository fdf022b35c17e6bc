"""`flamingo data stats`: how many samples, images and tokens, how large and how long, as JSON and picture.

Headers of images are read, pixels are not decoded: `verify` finds what is damaged.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flamingo.data.document import Clip, Document, Image, Text, content_key
from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members, reader
from flamingo.data.places import expand
from flamingo.data.shards import ShardSet
from flamingo.data.tools.executors import Executor, Outcome, Task
from flamingo.data.transforms import decoding_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE_STEP = 32  # pixels of a bar
HISTOGRAMS = {
    "images_per_document": "images of a document",
    "length": "{unit} of a document",
    "shorter_side": "shorter side of an image, pixels",
    "aspect": "width / height of an image",
}
Work = tuple[str, str, Mapping[str, Any], str | None]  # path, kind, options, tokenizer


def stats(
    patterns: Sequence[str],
    kind: str,
    options: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    executor: Executor | None = None,
) -> tuple[dict[str, Any], Outcome]:
    """Counts and histograms over all shards, as `write` takes them; and the tasks' outcome.

    tokenizer: name or folder; None: texts are counted in characters.

    Raises:
        ValueError: no such shards, kind or tokenizer.
    """
    reader(kind, options or {})
    if tokenizer:
        _tokenizer(tokenizer)
    tasks = [Task(str(p), _count, (str(p), kind, options or {}, tokenizer)) for p in expand(patterns)]
    outcome = (executor or Executor()).run(tasks, "counting")
    total: dict[str, Counter] = {}
    for told in outcome.results.values():
        for name, counts in told.items():
            total.setdefault(name, Counter()).update(counts)
    found: dict[str, Any] = {"unit": "tokens" if tokenizer else "characters", "shards": len(outcome.results)}
    found |= dict(total.pop("totals", Counter()))
    found["faults"] = dict(total.pop("faults", Counter()))
    found["summary"] = {name: _summary(total.get(name, Counter())) for name in HISTOGRAMS}
    found["histograms"] = {name: sorted(total.get(name, Counter()).items()) for name in HISTOGRAMS}
    return found, outcome


def write(found: Mapping[str, Any], out: Path) -> tuple[Path, Path]:
    """stats.json and stats.png in the folder `out`; their paths. Needs matplotlib."""
    figure = picture(found)
    out.mkdir(parents=True, exist_ok=True)
    (out / "stats.json").write_text(json.dumps(found, indent=1) + "\n")
    figure.savefig(out / "stats.png", dpi=110)
    return out / "stats.json", out / "stats.png"


def picture(found: Mapping[str, Any]) -> Figure:
    """The histograms. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        raise ValueError("the picture needs matplotlib: pip install 'flamingo-vlm[eval]'") from None
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, HISTOGRAMS.items(), strict=True):
        bars = found["histograms"][name]
        values, weights = [value for value, _ in bars], [count for _, count in bars]
        if values:
            few = len(values) <= 12 and all(isinstance(value, int) for value in values)
            if few and name == "images_per_document":
                axes.bar(values, weights)
            else:
                axes.hist(values, bins=min(60, max(10, len(values))), weights=weights)
        if name != "aspect":  # there is no document of 2.75 images
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel(label.format(**found))
        axes.set_ylabel("images" if name in ("shorter_side", "aspect") else "documents")
    figure.suptitle(
        f"{found['samples']:,} documents, {found['images']:,} images, {found['length']:,} {found['unit']}"
    )
    return figure


def _summary(counts: Mapping[Any, int]) -> dict[str, Any]:
    """Mean, smallest, median, 95 % and largest of a histogram."""
    total = sum(counts.values())
    if not total:
        return {}
    ordered = sorted(counts.items())
    told = {
        "mean": round(sum(v * n for v, n in ordered) / total, 3),
        "min": ordered[0][0],
        "max": ordered[-1][0],
    }
    for name, share in (("median", 0.5), ("p95", 0.95)):
        below = 0
        for value, count in ordered:
            below += count
            if below >= share * total:
                told[name] = value
                break
    return told


def _count(work: Work) -> dict[str, Counter]:
    """The task: counts of one shard."""
    path, kind, options, tokenizer = work
    shard, read = ShardSet(Path(path), may_be_empty=True), reader(kind, options)
    found = {name: Counter() for name in ("totals", "faults", *HISTOGRAMS)}
    found["totals"].update(samples=0, bad_samples=0, images=0, clips=0, length=0)
    for number in range(int(shard.counts[0])):
        sample = shard.read(0, number)
        try:
            with decoding_for(None, lambda key: True):  # nobody looks at the pixels
                document = read(sample, shard.key(0, number))
        except BadSample as error:
            found["totals"]["bad_samples"] += 1
            found["faults"][error.fault] += 1
            continue
        _add(found, document, _sizes(sample), tokenizer)
    return found


def _sizes(sample: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
    """Content key -> width and height, of the members that are images."""
    sizes = {}
    for data in sample.values():
        try:
            sizes[content_key(data)] = _members.size(data)
        except BadSample:
            continue
    return sizes


def _add(
    found: dict[str, Counter],
    document: Document,
    sizes: Mapping[str, tuple[int, int]],
    tokenizer: str | None,
) -> None:
    totals = found["totals"]
    images = [item for item in document.items if isinstance(item, Image)]
    length = _length([item.text for item in document.items if isinstance(item, Text)], tokenizer)
    clips = sum(isinstance(item, Clip) for item in document.items)
    totals.update(samples=1, images=len(images), clips=clips, length=length)
    found["images_per_document"][len(images) + clips] += 1
    found["length"][length] += 1
    for width, height in (sizes[image.key] for image in images if image.key in sizes):
        found["shorter_side"][min(width, height) // SIDE_STEP * SIDE_STEP] += 1
        found["aspect"][round(width / height, 1)] += 1


def _length(texts: list[str], tokenizer: str | None) -> int:
    if tokenizer is None or not texts:
        return sum(map(len, texts))
    ids: Any = _tokenizer(tokenizer)(texts, add_special_tokens=False)["input_ids"]
    return sum(map(len, ids))


@lru_cache(maxsize=1)
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {name}: {str(error).splitlines()[0]}") from None
