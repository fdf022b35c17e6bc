"""`flamingo clip score`: CLIPScore of captions that were said already, without asking the model again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo.eval.metrics import _clip, clip_score, ref_clip_score
from flamingo.eval.results.statistics import Clusters, Interval, interval
from flamingo.eval.run import answer_files, read_answers
from flamingo.eval.session import PLAN, Plan

SAID, KNOWN = ("prediction", "caption"), ("answers", "references")  # names of fields in files


@dataclass(frozen=True)
class Record:
    """A caption of a picture; references: of people, may be none."""

    id: str
    image: Path
    caption: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A metric over all captions of a setting, with its 95 % interval over pictures."""

    title: str
    scale: float
    value: float
    interval: Interval


@dataclass(frozen=True)
class Scored:
    """name: of the setting, "" for a plain file; n: captions; each: one record per caption."""

    name: str
    n: int
    empty: int
    figures: dict[str, Figure]
    each: list[dict[str, Any]]

    def as_json(self, encoder: str) -> str:
        figures = {n: {"value": f.value, "interval": list(f.interval)} for n, f in self.figures.items()}
        return json.dumps(
            {"setting": self.name, "n": self.n, "empty": self.empty, "encoder": encoder, **figures}
        )


def score(answers: Path, encoder: str | None = None, images: Path | None = None) -> Iterator[Scored]:
    """Each setting of an evaluation, with all its seeds; or the one list of a JSONL file.

    answers: the folder of `flamingo eval run`, or a file of {"image", "prediction" or "caption", and
    maybe "answers" or "references", "id"}; encoder: None: as the metric chooses it; images: a folder
    that pictures are sought in by their names, None: where the answers say.
    Raises ValueError for answers and pictures that are not there.
    """
    settings = _of_evaluation(answers) if answers.is_dir() else {"": [_of_file(answers)]}
    found = {name: [_records(each, images) for each in seeds] for name, seeds in settings.items()}
    by = _clip.encoder(encoder)
    for name, seeds in found.items():
        yield _scored(by, name, seeds)


def _of_evaluation(folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Setting -> records of each seed that was answered."""
    answers = folder if (folder / PLAN).is_file() else folder / "answers"
    if not (answers / PLAN).is_file():
        raise ValueError(
            f"{folder} holds no evaluation: name the --out of `flamingo eval run`, or a file of captions"
        )
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for setting in Plan.read(answers).config.settings():
        if records := read_answers(answer_files(answers, setting)):
            found.setdefault(setting.name, []).append(records)
    if not found:
        raise ValueError(f"{answers} holds no answers yet: run the evaluation first")
    return found


def _of_file(file: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {number}: must be an object, not {type(record).__name__}")
        found.append({"id": str(number), **record})
    if not found:
        raise ValueError(f"{file} holds no captions")
    return found


def _records(records: Sequence[dict[str, Any]], images: Path | None) -> list[Record]:
    found = []
    for record in records:
        caption = next((record[name] for name in SAID if name in record), None)
        references = next((record[name] for name in KNOWN if name in record), [])
        if not isinstance(caption, str) or not isinstance(record.get("image"), str):
            raise ValueError(
                f"answer {record['id']}: needs an image and a {' or '.join(SAID)}, both texts; it has "
                f"{', '.join(record)}"
            )
        if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
            raise ValueError(f"answer {record['id']}: {' or '.join(KNOWN)} must be a list of texts")
        image = Path(record["image"])
        image = image if images is None else images / image.name
        if not image.is_file():
            raise ValueError(
                f"picture {image} of answer {record['id']} is not there: name its folder with --images"
            )
        found.append(Record(str(record["id"]), image, caption, tuple(references)))
    return found


def _scored(by: Any, name: str, seeds: Sequence[Sequence[Record]]) -> Scored:
    flat = [record for records in seeds for record in records]
    captions, references = [each.caption for each in flat], [each.references for each in flat]
    values = {"clip_score": _clip.clip_scores(by, captions, [each.image for each in flat])}
    titles = {"clip_score": clip_score, "ref_clip_score": ref_clip_score}
    if all(references):
        values["ref_clip_score"] = _clip.ref_clip_scores(by, values["clip_score"], captions, references)
    figures = {}
    for metric, found in values.items():
        at = iter(found.tolist())
        clusters = Clusters.of([{record.id: next(at) for record in records} for records in seeds])
        module = titles[metric]
        figures[metric] = Figure(module.TITLE, module.SCALE, clusters.mean, interval(clusters))
    rows = [{metric: round(float(found[n]), 6) for metric, found in values.items()} for n in range(len(flat))]
    seed = [number for number, records in enumerate(seeds) for _ in records]
    each = [
        {"setting": name, "seed": seed[n], "id": record.id, "caption": record.caption, **rows[n]}
        for n, record in enumerate(flat)
    ]
    return Scored(name, len(flat), sum(not text.strip() for text in captions), figures, each)
