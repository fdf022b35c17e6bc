"""A folder that an evaluation has written: its figures, and the answers that they were made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic

from flamingo.eval import metrics
from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.config import EvalConfig, explained
from flamingo.eval.few_shot import Setting
from flamingo.eval.run import answer_files, read_answers

NEEDED = "benchmark title description split blind fingerprint config seconds metrics settings"
Records = dict[str, dict[str, Any]]  # by query, in the order that they were written


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    figures: what eval.json holds. config: the settings that it was made with.
    """

    folder: Path
    figures: dict[str, Any]
    config: EvalConfig

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """Raises ValueError for a file that is missing, damaged, of another version, or answers that
        are not those that the figures were made of."""
        path = folder / "eval.json"
        figures = _json(path)
        if figures is None:
            raise ValueError(f"{path} is not there: name the folder of a finished `flamingo eval run`")
        if lacking := [name for name in NEEDED.split() if name not in figures]:
            raise ValueError(f"{path} has no {', '.join(lacking)}: it is of another version; evaluate again")
        try:
            config = EvalConfig(**figures["config"])
        except pydantic.ValidationError as error:
            raise ValueError(f"{path} is of another version ({explained(error)}); evaluate again") from None
        found = cls(folder, figures, config)
        found._check_plan()
        return found

    def _check_plan(self) -> None:
        plan = _json(self.folder / "answers" / "plan.json")
        if plan is None:
            return
        same = plan.get("fingerprint") == self.figures["fingerprint"]
        ours = {k: v for k, v in self.figures["config"].items() if k != "tokens_per_batch"}
        theirs = {k: v for k, v in (plan.get("config") or {}).items() if k != "tokens_per_batch"}
        if not same or ours != theirs:
            raise ValueError(
                f"{self.folder}/answers are of another model or other settings than eval.json beside them: "
                "finish that evaluation with the same command, or name another folder"
            )

    @cached_property
    def metric(self) -> ModuleType:
        """The score: the first metric."""
        return metrics.load(self.figures["metrics"][0]["name"])

    @property
    def scale(self) -> float:
        return self.figures["metrics"][0]["scale"]

    def named(self, name: str) -> list[Setting]:
        """All seeds of a setting that eval.json tells of; none where it does not."""
        return [setting for setting in self.config.settings() if setting.name == name]

    def records(self, setting: Setting) -> Records:
        """Raises ValueError where there are none, or a query was answered twice."""
        found = read_answers(answer_files(self.folder / "answers", setting))
        by_id = {record["id"]: record for record in found}
        if not found or len(found) != len(by_id):
            raise ValueError(
                f"{self.folder}/answers: {setting.slug} has {len(found)} answers to {len(by_id)} questions; "
                "evaluate again with --overwrite"
            )
        return by_id


def sides(records: list[dict[str, Any]]) -> tuple[list[Prediction], list[Example]]:
    """What metrics take, of records."""
    predictions = [Prediction(r["id"], r["prediction"], tuple(r["scores"])) for r in records]
    examples = [
        Example(r["id"], Path(r["image"]), r["question"], tuple(r["answers"]), r["kind"]) for r in records
    ]
    return predictions, examples


def per_query(metric: ModuleType, records: Records) -> dict[str, float] | None:
    """A metric's value of each query; None where it has none."""
    if not all(record["answers"] for record in records.values()):
        return None
    values = metric.per_sample(*sides(list(records.values())))
    return None if values is None else dict(zip(records, values, strict=True))


def _json(path: Path) -> dict[str, Any] | None:
    """None where there is no file. Raises ValueError for a damaged one."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, found a {type(found).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and evaluate again") from None
    return found
