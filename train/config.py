"""The recipe as typed models. Knows `data.config` and how they are read (`train/reading.py`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flamingo.data.config import SourceConfig
from flamingo.train.reading import read

RECIPE = "recipe.yaml"  # in the folder of a run


# Parameter groups with learning rates of their own; `optim.group_of` says what is in them.
Group = Literal[
    "gates", "gated_blocks", "resampler", "embeddings", "lora", "language_model", "vision_encoder"
]


def _number_as_text(value: Any) -> Any:
    """A folder may be called 2024, which YAML reads as a number."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    """What `flamingo.factory.create` assembles; `architecture` holds fields of FlamingoConfig."""

    vision: str = Field(description="frozen encoder, source:name, e.g. timm:resnet50")
    language: str = Field(description="frozen causal LM, a name or a local folder")
    vision_options: dict[str, Any] = Field(
        default_factory=dict, description="for the encoder's source, e.g. {image_size: 336}"
    )
    frozen_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="weights of encoder and LM; auto: as `autocast`"
    )
    architecture: dict[str, Any] = Field(default_factory=dict)
    start: str | None = Field(
        None,
        description="trained model that the run begins with: a model folder, or a file of `flamingo export`; "
        "what `architecture` does not name is that model's",
    )


class AdamWConfig(Section):
    """AdamW with warm-up, and the course of its learning rate."""

    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = Field(
        "constant", description="wsd: warm-up, stable, then linear decay over the last steps"
    )
    decay_share: float = Field(0.1, gt=0, le=1, description="share of the steps in which wsd decays")
    final_lr: float = Field(0.0, ge=0, le=1, description="share of lr that cosine, linear and wsd end at")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient, once per step")


class OptimizerConfig(AdamWConfig):
    """AdamW with warm-up. Weight decay acts on matrices of the gated blocks only (paper, B.1.2)."""

    lr_factors: dict[Group, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="own factors of lr, e.g. {gates: 10, resampler: 0.5}"
    )


class LoraConfig(Section):
    """Low-rank adapters in the frozen LM (Hu et al. 2021), by PEFT."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(
        "all-linear", description="names of the LM's layers, as PEFT has them"
    )


class Unfreeze(Section):
    """A part that is trained as well, from a step on."""

    part: Literal["language_model", "vision_encoder", "embeddings"]
    start: int = Field(0, ge=0, description="the first step that trains it")


class EvaluateConfig(Section):
    """A small evaluation while training goes on."""

    every: int = Field(ge=1, description="steps between evaluations; one more at the end")
    settings: dict[str, Any] = Field(
        description="of `flamingo eval run`, e.g. {benchmark: easy_vqa, shots: [0, 4], limit: 200}"
    )


class RunConfig(Section):
    """What every training run has, whatever it trains. Steps are optimizer steps."""

    IDENTITY: ClassVar[tuple[str, ...]] = ()  # what must not change when a run goes on

    run: Annotated[Path, BeforeValidator(_number_as_text)] = Field(
        description="folder of the run: metrics, checkpoints, exported model"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(ge=1)
    workers: int = Field(0, ge=0, description="processes per rank that read and decode ahead")
    max_bad_samples: int = Field(
        1000, ge=0, description="different bad samples that are replaced before the run stops"
    )
    log_every: int = Field(1, ge=1)
    trackers: list[str] = Field(
        default_factory=lambda: ["tensorboard"],
        description="beside metrics.jsonl: tensorboard, wandb, trackio, or the dotted path of a class",
    )
    checkpoint_every: int = Field(500, ge=0, description="0: only at the end")
    checkpoint_keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    checkpoint_background: bool = Field(
        False, description="write while training goes on; costs memory for a copy of what is written"
    )
    wall_minutes: float | None = Field(
        None,
        gt=0,
        description="write a checkpoint and end with status 75 after so long, before a queue kills",
    )
    watchdog_seconds: float = Field(
        1800.0,
        ge=0,
        description="a step that takes longer: the ranks that hang are named, the run ends; as long ranks "
        "wait for each other at the start; four times as long for loading, the first step, data, a "
        "checkpoint, an evaluation, the export; 0: never",
    )

    def identity(self) -> dict[str, Any]:
        """What must not change between the parts of a resumed run."""
        return self.model_dump(mode="json", include=set(self.IDENTITY))

    def like(self, before: Self) -> Self:
        """What is left to the machine, as the run `before` has it."""
        return self


class Recipe(RunConfig):
    """One training run. Steps are optimizer steps; batches are counted over all ranks."""

    IDENTITY = ("seed", "steps", "model", "sources", "optimizer", "autocast", "lora", "unfreeze", "z_loss")

    model: ModelConfig
    sources: list[SourceConfig] = Field(min_length=1)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)  # type: ignore[arg-type]
    accumulation: int = Field(1, ge=1, description="micro-batches per step, source and rank")
    pack_tokens: int = Field(
        0, ge=0, description="documents share rows of at most so many tokens; 0: one document a row"
    )
    autocast: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="arithmetic of the trained part; its weights are always float32. auto: bfloat16, or "
        "float32 on processors without bfloat16 products; a run that goes on keeps what it began with",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="what ranks share out: 1 optimizer, 2 and gradients, 3 and all weights"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="kept in the CPU's memory: the optimizer's state (ZeRO 1 to 3), or weights too (3)",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute the layers' activations in the backward pass instead of keeping them"
    )
    compile: bool = Field(False, description="torch.compile the decoder layers and the resampler")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="added to DeepSpeed's configuration as it stands"
    )
    lora: LoraConfig | None = None
    unfreeze: list[Unfreeze] = Field(default_factory=list)
    z_loss: float = Field(0.0, ge=0, description="weight of the mean squared log of the softmax's sum")
    feature_cache_gb: float = Field(
        0.0, ge=0, description="memory per rank for grids of frozen images, so that none is encoded twice"
    )
    features: list[str] | str = Field(
        default_factory=list, description="folders of grids that `flamingo data features` made"
    )
    blank_every: int = Field(20, ge=0, description="steps between losses with blank images; 0: never")
    evaluate: EvaluateConfig | None = None
    profile_steps: list[int] = Field(
        default_factory=list, description="steps whose profiler traces are kept in RUN/profile"
    )
    export: bool = Field(
        True,
        description="write the model to RUN/model at the end; false where the machine cannot hold it whole "
        "(ZeRO-3): `flamingo export` does it elsewhere",
    )
    max_skipped_steps: int = Field(
        10, ge=0, description="steps in a row without a finite gradient before the run stops"
    )

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources: names must differ, got {names}")
        long = [source.name for source in self.sources if source.max_tokens > self.pack_tokens]
        if self.pack_tokens and long:
            raise ValueError(
                f"pack_tokens={self.pack_tokens} is shorter than max_tokens of {', '.join(long)}: "
                "raise it, lower max_tokens, or set it to 0 for one document a row"
            )
        self._check_without_effect()
        self._check_optimizer()
        self._check_zero()
        self._check_encoder()
        self._check_embeddings()
        return self

    def settled(self, autocast: str, frozen_dtype: str) -> Recipe:
        """These in place of `auto`."""
        model = self.model
        if model.frozen_dtype == "auto":
            model = model.model_copy(update={"frozen_dtype": frozen_dtype})
        own = self.autocast if self.autocast != "auto" else autocast
        return self.model_copy(update={"autocast": own, "model": model})

    def like(self, before: Recipe) -> Recipe:
        return self.settled(before.autocast, before.model.frozen_dtype)

    def _check_without_effect(self) -> None:
        if first := min(source.start for source in self.sources):
            raise ValueError(
                f"sources: none begins before step {first}, so the steps before would train on nothing: set "
                "start of one source to 0"
            )
        starts = {part.part: part.start for part in self.unfreeze}
        if len(starts) < len(self.unfreeze):
            raise ValueError("unfreeze: a part stands there twice; name each once")
        if starts.get("embeddings", -1) >= starts.get("language_model", math.inf):
            raise ValueError("unfreeze: the embeddings are trained with the language_model: remove them")
        for part in self.unfreeze:
            if part.start >= self.steps:
                raise ValueError(
                    f"unfreeze: {part.part} from step {part.start} on, but the run has steps={self.steps}: "
                    "lower start, or raise steps"
                )
        if late := [step for step in self.profile_steps if not 1 <= step <= self.steps]:
            raise ValueError(
                f"profile_steps: {late[0]} is none of the steps 1 to {self.steps} of this run (steps)"
            )

    def _check_optimizer(self) -> None:
        trained = {part.part for part in self.unfreeze} | ({"lora"} if self.lora else set())
        for group in self.optimizer.lr_factors:
            if group in ("lora", "language_model", "vision_encoder") and group not in trained:
                how = "set `lora`" if group == "lora" else f"unfreeze=[{{part: {group}}}]"
                raise ValueError(
                    f"optimizer.lr_factors.{group}: nothing of that group is trained: {how}, or remove it"
                )
        if self.model.architecture.get("fusion") == "prefix":
            between = [group for group in ("gates", "gated_blocks") if group in self.optimizer.lr_factors]
            if between:
                raise ValueError(f"optimizer.lr_factors.{between[0]}: fusion=prefix has none: remove it")
        given = self.optimizer
        if given.final_lr and given.schedule == "constant":
            raise ValueError(
                f"optimizer.final_lr={given.final_lr:g}: schedule=constant ends at lr itself: set another "
                "schedule, or remove it"
            )
        if given.decay_share != type(given).model_fields["decay_share"].default and given.schedule != "wsd":
            raise ValueError(
                f"optimizer.decay_share={given.decay_share:g}: is of schedule=wsd, not {given.schedule}: "
                "remove it"
            )

    def _check_zero(self) -> None:
        if self.offload != "none" and not self.zero_stage:
            raise ValueError(f"offload={self.offload}: needs zero_stage 1, 2 or 3, not 0")
        if self.offload == "all" and self.zero_stage < 3:
            raise ValueError(
                f"offload=all: needs zero_stage=3, not {self.zero_stage}; offload=optimizer does not"
            )
        if self.zero_stage == 3 and self.model.start:
            raise ValueError(
                f"model.start={self.model.start}: under zero_stage=3 weights lie in pieces as they are made: "
                "set zero_stage to 2"
            )
        if self.zero_stage == 3 and self.evaluate:
            raise ValueError(
                "evaluate: under zero_stage=3 weights lie in pieces, and ranks generate different numbers "
                "of tokens: set zero_stage to 2, or evaluate what `flamingo export` writes"
            )
        late = [part for part in self.unfreeze if part.start > 0]
        if self.zero_stage == 3 and late:
            raise ValueError(
                f"unfreeze: {late[0].part} from step {late[0].start} on, but under zero_stage=3 what lies in "
                "pieces cannot change its role: set start to 0, or zero_stage to 2"
            )

    def _check_encoder(self) -> None:
        if not any(part.part == "vision_encoder" for part in self.unfreeze):
            return
        if self.feature_cache_gb or self.features:
            raise ValueError(
                "unfreeze: a vision_encoder that is trained gives other grids at every step: set "
                "feature_cache_gb to 0 and remove `features`"
            )
        if self.zero_stage == 3:
            raise ValueError(
                "unfreeze: vision_encoder with zero_stage=3: ranks encode different numbers of pictures, and "
                "modules in pieces have to run equally often; set zero_stage to 2"
            )

    def _check_embeddings(self) -> None:
        half = self.model.frozen_dtype not in ("auto", "float32")
        if half and self.autocast == "float32" and any(part.part == "embeddings" for part in self.unfreeze):
            raise ValueError(
                "unfreeze: embeddings are trained in float32, which layers in "
                f"model.frozen_dtype={self.model.frozen_dtype} cannot read without autocast: set "
                "model.frozen_dtype to float32, or autocast to the same"
            )


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a Flamingo's training; see `read`."""
    return read(path, overrides, Recipe)
