"""What an evaluation does: one model on one benchmark, in all its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flamingo.eval.few_shot import Control, Setting, Source
from flamingo.names import hint

SHOTS = (0, 4, 8, 16, 32)  # of the papers


class EvalConfig(BaseModel):
    """Attributes:
    data: folder of the benchmark's official files; split: the one that is asked, None: the
        benchmark's own choice.
    shots: numbers of shots; shots_from: how they are chosen; pool: demonstrations that they are drawn
        from, a fixed sample of the training split (the papers': 2,048); None: all of it.
    zero_shot: with 0 shots, "text": two shots without pictures, as in the papers; "none": no shot.
    trials: seeds, from `seed` on; each draws other shots.
    limit: queries, a fixed sample; None: all; shots_limit: the same, where there are shots.
    control_shots: shots of the controls that change shots; None: the smallest of `shots` above 1.
    control_limit: queries of each control; 0: no controls.
    beams: of beam search (the papers': 3); max_new_tokens: None: the benchmark's own.
    ensemble: orders of the shots whose answers are put together; calibrate: class likelihoods
        relative to a blank picture (Zhao et al. 2021).
    index: folder of `flamingo eval index`, or a Milvus address, for shots_from="similar";
    similarity: what of a query is compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    benchmark: str
    data: Path | None = None
    split: str | None = None
    shots: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = SHOTS
    shots_from: Source = "random"
    pool: Annotated[int, Field(ge=1)] | None = 2048
    zero_shot: Literal["text", "none"] = "text"
    trials: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    shots_limit: Annotated[int, Field(ge=1)] | None = None
    control_shots: Annotated[int, Field(ge=2)] | None = None
    control_limit: Annotated[int, Field(ge=0)] | None = 2000
    beams: Annotated[int, Field(ge=1)] = 3
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    ensemble: Annotated[int, Field(ge=1)] = 1
    calibrate: bool = False
    index: str | None = None
    similarity: Literal["image", "text", "both"] = "image"
    tokens_per_batch: Annotated[int, Field(ge=1)] = 2048

    @field_validator("shots")
    @classmethod
    def _in_order(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(shots)))

    def settings(self) -> list[Setting]:
        """All settings, those of the plain shots first, each with all its seeds."""
        plain = [(n, None, _least(self.limit, self.shots_limit if n else None)) for n in self.shots]
        return [
            Setting(shots, control, limit, self.seed + trial, self.shots_from, self.zero_shot == "text")
            for shots, control, limit in [*plain, *self._controls()]
            for trial in range(self.trials)
        ]

    def _controls(self) -> list[tuple[int, Control, int | None]]:
        """(shots, control, limit): images blanked at the fewest shots, the rest where there are shots."""
        if self.control_limit == 0:
            return []
        limit = _least(self.control_limit, self.limit)
        shots = self.control_shots or next((n for n in self.shots if n > 1), None)
        found: list[tuple[int, Control, int | None]] = [(self.shots[0], "blank", limit)]
        if shots is not None:
            found.append((shots, "text_only_shots", limit))
            found.append((shots, "shuffled_shots", limit))
        return found


def explained(error: ValidationError) -> str:
    """One line of what is wrong: value, rule, and the nearest setting for a name that is unknown."""
    said = []
    for found in error.errors():
        name = ".".join(map(str, found["loc"]))
        if found["type"] == "extra_forbidden":
            said.append(f"unknown setting {name!r}; {hint(name, EvalConfig.model_fields)}")
        else:
            said.append(f"{name}={found.get('input')!r}: {found['msg']}")
    return "; ".join(said)


def _least(*limits: int | None) -> int | None:
    return min((x for x in limits if x is not None), default=None)
