"""The recipe of a dual encoder: which model, which pairs, which loss. Knows `data.config` only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from flamingo.data.config import Augment, SourceConfig
from flamingo.data.remote import Remote
from flamingo.train.config import AdamWConfig, RunConfig, Section
from flamingo.train.reading import read

NAME = "pairs"  # of the source, in logs and keys
OWN = ("embed_dim", "vision_cfg", "text_cfg")


class EncoderConfig(Section):
    """One of open_clip's models by `name`, or a new one by `embed_dim`, `vision_cfg` and `text_cfg`."""

    name: str | None = Field(
        None,
        description="ARCHITECTURE, ARCHITECTURE/WEIGHTS (ViT-B-32/openai, or a file), or a folder as a run "
        "leaves it",
    )
    embed_dim: int | None = Field(None, ge=1, description="width of the vectors that are compared")
    vision_cfg: dict[str, Any] | None = Field(
        None, description="open_clip's, e.g. {image_size: 64, patch_size: 8, width: 128, layers: 4}"
    )
    text_cfg: dict[str, Any] | None = Field(
        None, description="open_clip's, e.g. {context_length: 16, width: 128, heads: 2, layers: 2}"
    )
    image_size: int | None = Field(None, ge=1, description="pixels of a named model, None: its own")
    lock_image: bool = Field(
        False, description="the image tower keeps its weights, only texts learn (Zhai et al. 2022, LiT)"
    )
    lock_text: bool = Field(False, description="the text tower keeps its weights")

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        given = [key for key in OWN if getattr(self, key) is not None]
        if self.name and given:
            raise ValueError(
                f"name={self.name!r} and {', '.join(given)}: give a name, or sizes of a new model"
            )
        if not self.name and len(given) < len(OWN):
            raise ValueError(f"needs a name, or all of {', '.join(OWN)} for a new model")
        if self.image_size and not self.name:
            raise ValueError("image_size is for a named model; a new one has it in vision_cfg")
        if hugging := [key for key in self.text_cfg or {} if key.startswith("hf_")]:
            raise ValueError(f"text_cfg.{hugging[0]}: a new model has the text tower of open_clip itself")
        locked = [key for key in ("lock_image", "lock_text") if getattr(self, key)]
        if locked and not self.name:
            raise ValueError(f"{locked[0]}: a new model has no weights to keep; give a name with weights")
        if len(locked) == 2:
            raise ValueError("lock_image and lock_text: nothing would be left to train")
        return self


class PairsConfig(Section):
    """Shards of kind `pairs`: a picture and its caption (KEY.jpg with KEY.txt or KEY.json)."""

    shards: str | list[str] = Field(description="as those of `sources` in the recipe of a Flamingo")
    batch: int = Field(ge=2, description="pairs per step, over all ranks: each is compared with all others")
    augment: Augment | None = Field(None, description="random crops and mirror images")
    window: int = Field(16, ge=1, description="pairs are shuffled within so many shards")
    remote: Remote = Field(default_factory=Remote, description="how shards in a store are fetched")
    max_sample_mb: int = Field(256, ge=1, description="a larger pair is bad, and not read")

    def source(self) -> SourceConfig:
        """The same as a source of `flamingo.data`."""
        shared = {key: getattr(self, key) for key in type(self).model_fields}
        return SourceConfig(name=NAME, kind="pairs", max_tokens=2, **shared)


class ValidationConfig(Section):
    """Held-out pairs: how often a picture finds its caption among all captions, and the reverse."""

    shards: str | list[str] = Field(description="other shards than those of `data`")
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only after the last step")
    limit: int | None = Field(None, ge=2, description="the first so many pairs; None: all")
    batch: int = Field(64, ge=1, description="pictures or captions of a forward pass, per rank")
    remote: Remote = Field(default_factory=Remote, description="how shards in a store are fetched")


class ContrastiveOptimizer(AdamWConfig):
    """AdamW with warm-up. Decay acts on matrices, not on biases, norms, positions and the scale."""

    lr: float = Field(5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.2, ge=0)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = Field(
        "cosine", description="wsd: warm-up, stable, then linear decay over the last steps"
    )


class ContrastiveRecipe(RunConfig):
    """One training run of a dual encoder."""

    IDENTITY = ("seed", "steps", "model", "data", "loss", "equal_captions", "optimizer", "autocast")

    model: EncoderConfig
    data: PairsConfig
    validation: ValidationConfig | None = None
    loss: Literal["clip", "siglip"] = Field(
        "clip", description="clip: softmax over the batch (Radford et al. 2021); siglip: a sigmoid per pair"
    )
    equal_captions: Literal["match", "differ"] = Field(
        "match",
        description="pictures whose captions are the same text: match: it is right for all of them; differ: "
        "only the own one counts as right, as in the papers",
    )
    optimizer: ContrastiveOptimizer = Field(default_factory=ContrastiveOptimizer)  # type: ignore[arg-type]
    autocast: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="arithmetic of the towers; weights and loss are always float32"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute the towers' activations in the backward pass instead of keeping them"
    )

    def identity(self) -> dict[str, Any]:
        """Where the shards lie may change; that they are the same is checked by their content."""
        found = super().identity()
        found["data"] = {key: found["data"][key] for key in ("batch", "augment", "window")}
        return found


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> ContrastiveRecipe:
    """A recipe from YAML with `a.b=value` overrides.

    Raises ValueError, naming file, key and the nearest known key, for anything it cannot use.
    """
    return read(path, overrides, ContrastiveRecipe)
