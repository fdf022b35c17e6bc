"""Names -> model and processor: assembles a Flamingo from a frozen encoder and a frozen LM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from flamingo import fusions
from flamingo import vision as vision_sources
from flamingo.config import ADDED_TOKENS, FlamingoConfig
from flamingo.decoder import residual_rms
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.names import hint
from flamingo.processing import FlamingoProcessor

# Within what it gives, parameters that lie in pieces on several ranks are whole.
Gathered = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]


def create(
    *,
    vision: str,
    language: str,
    vision_options: dict | None = None,
    frozen_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gathered: Gathered | None = None,
    loading: AbstractContextManager[Any] | None = None,
    **architecture,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """A Flamingo with pretrained frozen parts and new, untrained connecting parts.

    vision: "source:name", the name being one of the source's or a local folder;
    language: name or local folder for `AutoModelForCausalLM`; vision_options: passed to the
    source's `describe`, e.g. {"image_size": 336} or {"layer": -2}; frozen_dtype: of both frozen
    parts; seed: for the new parts; loading: within it the language model is loaded, e.g. in pieces over
    the ranks of a group (DeepSpeed's ZeRO-3); gathered: makes such pieces whole; architecture: fields of
    `FlamingoConfig`. What the gated blocks add is scaled to the LM's residual stream, measured
    here (`cross_attention_scale=None` leaves it out, as in the paper); with `fusion="prefix"` the vectors
    are scaled to its embeddings (`connector_scale=1.0` leaves them as they are).

    Raises ValueError for an unknown source, name, option or field.
    """
    source_name, _, name = vision.partition(":")
    source = vision_sources.source(source_name)
    if not name:
        raise ValueError(f"vision={vision!r}: write source:name, e.g. timm:tf_efficientnet_lite0")
    tokenizer = _tokenizer(language)
    with loading or nullcontext():
        language_model = AutoModelForCausalLM.from_pretrained(
            language, dtype=frozen_dtype, trust_remote_code=False
        )
    first_added = len(tokenizer)
    known = [token for token in ADDED_TOKENS if token in tokenizer.get_vocab()]
    if known:
        raise ValueError(
            f"language={language!r}: its tokenizer has {', '.join(known)} already, whose rows lie in "
            "its frozen tables; name the language model that it was made from"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED_TOKENS)})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_fields(architecture)
    config = FlamingoConfig(
        # A copy: the config takes over how attention is done, the LM is still used below.
        text_config=copy.deepcopy(language_model.config),
        vision_config=_described(source, name, vision_options or {}),
        first_added_token_id=first_added,
        end_of_chunk_token_id=first_added,
        image_token_id=first_added + 1,
        **architecture,
    )
    between = fusions.positions(config)
    if between and "cross_attention_scale" not in architecture:
        config.cross_attention_scale = _residual_scale(language_model, tokenizer, config, gathered)
    if not between and "connector_scale" not in architecture:
        config.connector_scale = _embedding_scale(language_model, gathered)
    torch.manual_seed(seed)
    model = FlamingoForConditionalGeneration(config, language_model)
    source.load(model.vision_encoder, name)
    model.vision_encoder.to(frozen_dtype)
    tables = [e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings())]
    with gathered(tables) if gathered else nullcontext():
        model.added_tokens.start_from(*tables, std=config.initializer_range)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, FlamingoProcessor.for_model(config, tokenizer)


def _described(source, name: str, options: dict):
    try:
        return source.describe(name, **options)
    except TypeError as error:  # an argument that neither the source nor its library has
        raise ValueError(f"vision_options={options}: not for {name!r}: {error}") from error


# Ordinary prose, of which only the size of its hidden states is wanted.
PROBE = (
    "The river was high after three days of rain, and nobody in the village slept much that night.",
    "Question: how many people live in the house? Answer: four, if you count the grandmother.",
    "A photo of two dogs on a beach",
)


def _residual_scale(
    language_model: nn.Module, tokenizer: Any, config: FlamingoConfig, gathered: Gathered | None
) -> list[float]:
    """One factor per gated block: the size of the residual stream that it adds to."""
    rows = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in PROBE]
    with _whole_while_used(language_model, gathered) if gathered else nullcontext():
        sizes = residual_rms(language_model, rows)
    return [float(f"{max(sizes[i], 1e-3):.3g}") for i in config.block_positions]


@torch.no_grad()
def _embedding_scale(language_model: Any, gathered: Gathered | None) -> float:
    """How large a word's embedding is as the first layer gets it: median root mean square."""
    table = language_model.get_input_embeddings()
    with gathered([table.weight]) if gathered else nullcontext():
        sizes = table.weight.float().square().mean(dim=1).sqrt()
    return float(f"{max(float(sizes.median()) * float(getattr(table, 'embed_scale', 1.0)), 1e-4):.3g}")


@contextmanager
def _whole_while_used(model: nn.Module, gathered: Gathered) -> Iterator[None]:
    """Within this `with`, the weights of a module are whole while it runs, and no longer."""
    open_now: dict[nn.Module, AbstractContextManager[Any]] = {}

    def before(module: nn.Module, args: Any) -> None:
        open_now[module] = gathered(list(module.parameters(recurse=False)))
        open_now[module].__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        open_now.pop(module).__exit__(None, None, None)

    owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(before) for module in owners]
    handles += [module.register_forward_hook(after) for module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokenizer(language: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(language, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"language={language!r}: no tokenizer in a folder of this name, in the local cache or on the "
            f"hub can be loaded: {error}"
        ) from error


def _check_fields(architecture: dict) -> None:
    known = set(FlamingoConfig.__annotations__) - {"text_config", "vision_config"}
    unknown = sorted(set(architecture) - known)
    if unknown:
        raise ValueError(f"FlamingoConfig has no {unknown[0]}; {hint(unknown[0], sorted(known))}")
