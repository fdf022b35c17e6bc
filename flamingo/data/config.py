"""What a recipe says about one source of data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from flamingo.data.kinds import check_kind


class SourceConfig(BaseModel):
    """One source: where its shards lie, how they are read, and how much they count."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Names its loss in the logs.")
    kind: str = Field(description="Shard format: a file of flamingo/data/kinds, or a module path.")
    shards: str | list[str] = Field(
        description="Plain tars: paths, globs (dir/*.tar), ranges (pairs-{000..003}.tar)."
    )
    batch: int = Field(ge=1, description="Samples per optimizer step, over all ranks.")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="Weight in the loss.")
    max_tokens: int = Field(ge=2, description="Longer documents are cut, by whole turns if possible.")
    start: int = Field(default=0, ge=0, description="The source joins at this step: a curriculum.")
    p_next: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of documents whose words see the next image instead of the one before.",
    )
    window: int = Field(default=16, ge=1, description="Samples are shuffled within so many shards.")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        # Module paths are imported when the shards are opened: reading a recipe runs no code.
        return check_kind(kind)
