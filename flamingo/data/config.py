"""What a recipe says about one source of data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from flamingo.data.kinds import check_kind
from flamingo.data.remote import Remote


class Augment(BaseModel):
    """Random changes of the pictures of a source, drawn from seed and position."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop_scale: tuple[float, float] = Field(
        default=(1.0, 1.0), description="A random crop keeps a share of the area in this range; 1, 1: all."
    )
    crop_ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="Its width to its height.")
    flip: float = Field(default=0.0, ge=0, le=1, description="Share of pictures that are mirrored.")

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, pair: tuple[float, float], info: Any) -> tuple[float, float]:
        largest = 1.0 if info.field_name == "crop_scale" else float("inf")
        if not 0 < pair[0] <= pair[1] <= largest:
            raise ValueError(f"two rising numbers above 0, at most {largest:g}, not {list(pair)}")
        return pair


class SourceConfig(BaseModel):
    """One source: where its shards lie, how they are read, and how much they count."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Names its loss in the logs.")
    kind: str = Field(description="Shard format: a file of flamingo/data/kinds, or a module path.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the kind; its file lists them."
    )
    shards: str | list[str] = Field(
        description="Plain tars: paths, globs (dir/*.tar), ranges (pairs-{000..003}.tar), or the same "
        "with https://, s3://, gs:// or hf:// before."
    )
    remote: Remote = Field(default_factory=Remote, description="How shards in a store are fetched.")
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
    learn: Literal["marked", "all", "after_first_image", "last"] = Field(
        default="marked",
        description="Texts with loss: as the kind marks them; all; marked ones behind the first image; of "
        "each turn the last one (the answer).",
    )
    crop: Literal["start", "random"] = Field(
        default="start", description="Which turns of a document that is too long are kept."
    )
    augment: Augment | None = Field(default=None, description="Random changes of the pictures.")
    max_sample_mb: int = Field(
        default=256, ge=1, description="A sample whose members are larger together is bad, and not read."
    )
    window: int = Field(default=16, ge=1, description="Samples are shuffled within so many shards.")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        # Module paths are imported when the shards are opened: reading a recipe runs no code.
        return check_kind(kind)
