"""What is trained beside the connecting parts: adapters in the LM, and parts that are unfrozen."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx.experimental._config
from einops import rearrange
from torch import nn

from flamingo.checkpoints.trainables import architecture_of
from flamingo.decoder import find_decoder_layers
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train.config import LoraConfig, Recipe

ADAPTER = "default"


def architecture(recipe: Recipe) -> dict[str, Any]:
    """Fields of FlamingoConfig: the recipe's, and for the rest those of the model that it starts with."""
    start = architecture_of(recipe.model.start) if recipe.model.start else {}
    return {**start, **recipe.model.architecture}


def add_adapters(model: FlamingoForConditionalGeneration, config: LoraConfig) -> None:
    """Put low-rank adapters into the LM, which stays frozen. They are float32 and trained.

    Raises ValueError where PEFT is not installed or finds no such modules.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ModuleNotFoundError:
        raise ValueError("`lora` needs PEFT: pip install 'flamingo-vlm[adapters]'") from None
    wanted = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
    )
    try:
        inject_adapter_in_model(wanted, model.language_model, ADAPTER)
    except ValueError as error:
        raise ValueError(f"lora.target_modules={config.target_modules!r}: {error}") from None
    for name, parameter in model.language_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def merge_adapters(model: FlamingoForConditionalGeneration) -> None:
    """Add what the adapters learned to the LM's own weights, and take them out."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.language_model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[operator]
            owner, _, last = name.rpartition(".")
            base: Any = module.get_base_layer()
            setattr(model.language_model.get_submodule(owner), last, base)


def boundaries(recipe: Recipe) -> list[int]:
    """Steps at which something is unfrozen, and the end: a phase ends at each."""
    starts = {part.start for part in recipe.unfreeze if 0 < part.start < recipe.steps}
    return [*sorted(starts), recipe.steps]


def unfreeze(model: FlamingoForConditionalGeneration, recipe: Recipe, step: int) -> None:
    """Unfreeze what the recipe trains at `step`, in float32, and all adapters."""
    due = [part.part for part in recipe.unfreeze if part.start <= step]
    if due:
        model.unfreeze(*due)
        for name, module in model.trained_modules().items():
            if name not in ("resampler", "gated_blocks", "added_tokens"):
                _to_float32(module)
    if recipe.lora:
        for name, parameter in model.language_model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)


def new_at(model: FlamingoForConditionalGeneration, recipe: Recipe, step: int) -> set[str]:
    """Names of parameters that are trained from this very step on: no checkpoint has them yet."""
    new = {part.part for part in recipe.unfreeze if part.start == step > 0}
    modules = model.trained_modules()
    owned = {
        id(parameter)
        for name, module in modules.items()
        if name in new or ("embeddings" in new and name.endswith("_embeddings"))
        for parameter in module.parameters()
    }
    prefix = "model."  # as the objective names them
    return {prefix + name for name, parameter in model.named_parameters() if id(parameter) in owned}


def compile_parts(model: FlamingoForConditionalGeneration) -> None:
    """torch.compile the forward of each decoder layer and of the resampler; rows vary in length.

    The forward and not the module: a module's graph would take in the hooks, and with them the
    gated blocks, whose shapes depend on which tokens see an image.
    """
    # Sizes that are equal by chance when a graph is made are not a rule for the next rows.
    torch.fx.experimental._config.use_duck_shape = False
    for seen in (torch.zeros(1), nn.Parameter(torch.zeros(1))):
        rearrange(seen, "x -> x")  # einops notes the types that it has met, and graphs ask how many
    for module in (model.resampler, *find_decoder_layers(model.language_model)):
        module.forward = torch.compile(module.forward, dynamic=True)


def _to_float32(module: nn.Module) -> None:
    """Weights that are trained; buffers such as rotary frequencies stay as they are."""
    for parameter in module.parameters():
        if (piece := getattr(parameter, "ds_tensor", None)) is not None:  # this rank's, under ZeRO-3
            piece.data = piece.data.to(torch.float32)
        parameter.data = parameter.data.to(torch.float32)
