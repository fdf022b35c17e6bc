"""A small evaluation of a model that is being trained: what a training loop calls every N steps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch

from flamingo.eval import config as configs
from flamingo.eval.predictor import Predictor
from flamingo.eval.results.summary import summarise
from flamingo.eval.run import Part
from flamingo.eval.task import Task
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.runtime import at_rest

FOLDER = "evaluations"


class Hook:
    """Evaluates on all ranks together, each its share of the queries, with the weights in memory.

    By default greedily and without controls, which training measures itself (`loss_blank`).
    """

    def __init__(self, settings: Mapping[str, Any]):
        """settings: fields of `EvalConfig`. Reads the data, so that what is wrong with it is said
        before training starts: raises ValueError."""
        fields = {"shots": (0,), "control_limit": 0, "beams": 1, **settings}
        try:
            self.config = configs.EvalConfig(**fields)
        except pydantic.ValidationError as error:
            raise ValueError(f"evaluate.settings: {configs.explained(error)}") from None
        if self.config.shots_from == "similar":
            raise ValueError(
                "evaluate.settings: shots_from=similar would embed demonstrations within training; choose "
                "random or fixed, and evaluate checkpoints by themselves"
            )
        self.task = Task.of(self.config)

    def __call__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        run: Path,
        rank: int,
        world: int,
        step: int,
    ) -> dict[str, float]:
        """{"0-shot": score, ...} as the metric shows it, on every rank; answers lie in RUN/evaluations."""
        out = run / FOLDER / f"step-{step:06d}"
        if rank == 0:  # a resumed run asks again: its earlier life may have been cut off here
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
        self._wait(world)
        with at_rest(model):
            self._answer(model, processor, out, rank, world)
        self._wait(world)
        summary = summarise(self.task, self.config, out, 0.0)
        self._wait(world)
        first = summary["metrics"][0]
        return {
            setting["name"]: round(first["scale"] * setting["metrics"][first["name"]]["value"], 4)
            for setting in summary["settings"]
            if first["name"] in setting["metrics"]  # not where a split has no published answers
        }

    @torch.no_grad()
    def _answer(self, model, processor, out: Path, rank: int, world: int) -> None:
        config = self.config
        predictor = Predictor.of(
            model,
            processor,
            max_new_tokens=config.max_new_tokens or self.task.benchmark.MAX_NEW_TOKENS,
            beams=config.beams,
            tokens_per_batch=config.tokens_per_batch,
        )
        part = Part(self.task, config, predictor, out, rank, world, quiet=True)
        for setting in config.settings():
            part.run(setting)

    @staticmethod
    def _wait(world: int) -> None:
        if world > 1:
            torch.distributed.barrier()
