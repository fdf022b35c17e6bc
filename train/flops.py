"""Model FLOPs of a training step, and the peak that they are compared with.

A multiplication and an addition are two. Counted are matrix products, convolutions and attention,
as torch's FlopCounterMode does; norms, activations and softmax are left out. Nothing is counted
twice: a layer that is recomputed in the backward pass is a cost of the way, not of the model.
T tokens, N images, P grid places, L latents, W widths, V vocabulary.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from flamingo.decoder import find_decoder_layers
from flamingo.fusions import positions
from flamingo.modeling import FlamingoForConditionalGeneration

MEASURE_SECONDS = 0.4
LARGEST = 8192  # side of the largest matrices that are multiplied to find the peak


@dataclass(frozen=True)
class Costs:
    """FLOPs of training on one unit of each kind that a step holds; they add up.

    token: a token in the LM and the blocks; target: its logits; pair: two tokens of one document
    that the LM's attention compares; look: a token and an image that it sees; image: one in the
    resampler, or one clip; place: a place of its grid; picture: one in the encoder; once: what is done for
    all images together.
    again: what of `token`, `pair` and `look` is done once more where activations are recomputed;
    extra: tokens of an image in the LM's input beyond the one in its row (`fusion="prefix"`).
    """

    token: float
    target: float
    pair: float
    look: float
    image: float
    place: float
    picture: float
    once: float
    again: tuple[float, float, float]
    extra: int = 0


def step_flops(
    model: FlamingoForConditionalGeneration,
    *,
    tokens: float,
    targets: float,
    images: float,
    pairs: float = 0.0,
    looks: float | None = None,
    places: float | None = None,
    pictures: float | None = None,
    recomputed: bool = False,
) -> float:
    """FLOPs of forward and backward over what a step holds; nothing of the optimizer.

    Frozen layers count twice (there and the gradient of what went in), or once where no gradient
    is needed; trained ones three times; logits of targets only.

    tokens: that the LM reads, without padding, an image one token; targets: those that are learned;
    images: <image> tokens; pairs: sum of the squared lengths of the documents as the LM reads them, an
    image `model.image_tokens` tokens (0 leaves the LM's attention out); looks: pairs of a token and an
    image that it sees (None: every token sees one); places: grid places of all images (None: one
    picture each); pictures: those that the encoder encodes, without cached ones (None: one per image);
    recomputed: with what activation checkpointing does again. Weights may be in pieces (ZeRO-3).
    """
    costs, vision_config = costs_of(model), model.config.vision_config
    rows, columns = vision_config.grid  # type: ignore[union-attr]
    looks = tokens if looks is None else looks
    pictures = images if pictures is None else pictures
    if places is None:
        places = float(images * rows * columns)
    tokens += costs.extra * images
    total = costs.token * tokens + costs.target * targets + costs.pair * pairs + costs.look * looks
    total += costs.image * images + costs.picture * pictures + costs.place * places
    total += costs.once if images else 0.0
    if recomputed:
        total += sum(c * n for c, n in zip(costs.again, (tokens, pairs, looks), strict=True))
    return float(total)


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[bool, ...], Costs]]
_KNOWN = weakref.WeakKeyDictionary()


def costs_of(model: FlamingoForConditionalGeneration) -> Costs:
    """The costs of a model as it is trained now; kept until something else is frozen."""
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    held = _KNOWN.get(model)
    if held is None or held[0] != trained:
        _KNOWN[model] = held = (trained, _count(model))
    return held[1]


def _count(model: FlamingoForConditionalGeneration) -> Costs:
    config, text = model.config, model.config.get_text_config()
    latents, inner = model.resampler.count, config.cross_attention_heads * config.cross_attention_head_dim
    heads = getattr(text, "num_attention_heads", 0)  # an LM without attention has none
    attended = 4.0 * heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    # Another fusion's own modules stand at no layer, and their products are not counted.
    between = positions(config)
    blocks: dict[int, Any] = dict(zip(between, model.gated_blocks, strict=False))
    flows = not between  # into the trained vectors in its input
    flows = flows or model.added_tokens.input.requires_grad or _trains(model.get_input_embeddings())
    token = pair = look = image = 0.0
    again = [0.0, 0.0, 0.0]
    for index, layer in enumerate(find_decoder_layers(model.language_model)):
        if block := blocks.get(index):
            queries = _products(block.attn.to_q) + _products(block.attn.to_out) + 4.0 * latents * inner
            fed = _products(block.ff)
            look, token, flows = look + 3 * queries, token + 3 * fed, True
            image += 3 * latents * _products(block.attn.to_kv)
            again[0], again[2] = again[0] + fed, again[2] + queries
        flows = flows or _trains(layer)
        token += _counted(layer, flows, text)
        pair += attended * (3 if flows else 1)
        again[0], again[1] = again[0] + _products(layer, text), again[1] + attended
    head = model.get_output_embeddings()
    target = _counted(head, True, text) + 3 * 2.0 * math.prod(_shape(model.added_tokens.output))
    place, per_image, once = _resampler(model)
    picture = encoder_flops(model) * (3 if _trains(model.vision_encoder) else 1)
    image, extra = image + per_image, model.image_tokens - 1
    twice = (again[0], again[1], again[2])
    return Costs(token, target, pair, look, image, place, picture, once, twice, extra)


def _resampler(model: FlamingoForConditionalGeneration) -> tuple[float, float, float]:
    """FLOPs of the connector in training: of a grid place, of an image besides, and of all images."""
    resampler, config = model.resampler, model.config
    if config.connector != "perceiver":  # a vector per place, or per several places
        per_vector = sum(
            # What goes into the first matrix is the frozen encoder's, which wants no gradient.
            flops * (2 if number == 0 and not _trains(model.vision_encoder) else 3)
            for number, (flops, _) in enumerate(_linears(resampler))
        )
        return 0.0, per_vector * resampler.count, 0.0
    latents = config.resampler_latents
    inner = config.resampler_heads * config.resampler_head_dim
    # The projection's input is the frozen encoder's, which wants no gradient.
    place = _products(resampler.project) * (3 if _trains(model.vision_encoder) else 2)
    image, once = 3.0 * resampler.count * _products(resampler.norm), 0.0  # to another width
    looked = 4.0 * latents * inner
    for number, (attention, feed) in enumerate(resampler.layers):  # type: ignore[misc]
        place += 3 * (_products(attention.to_kv) + looked)
        own = _products(attention.to_q) + _products(attention.to_kv)
        image += 3 * latents * (_products(attention.to_out) + _products(feed) + looked)
        if number:
            image += 3 * latents * own
        else:  # the first layer's latents are the same for all images
            once += 3 * latents * own
    return place, image, once


@torch.no_grad()
def encoder_flops(model: FlamingoForConditionalGeneration) -> float:
    """FLOPs of the encoder on one picture, counted while it runs without data."""
    encoder: nn.Module = model.vision_encoder  # type: ignore[assignment]
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    shapes = {n: torch.empty(_shape(t), dtype=t.dtype, device="meta") for n, t in tensors.items()}
    vision_config: Any = model.config.vision_config
    size, dtype = vision_config.image_size, next(encoder.parameters()).dtype
    pixels = torch.empty(1, 3, size, size, dtype=dtype, device="meta")
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        functional_call(encoder, shapes, (pixels,))
    return float(counter.get_total_flops())


def _linears(module: nn.Module, text: Any = None) -> Iterator[tuple[float, bool]]:
    """(FLOPs of one row, whether it is trained) of each matrix in a module; of experts, as many as a
    token is sent to."""
    share = _expert_share(text)
    for name, part in module.named_modules():
        expert = ".experts." in f".{name}."
        factor = share if expert else 1.0
        if isinstance(part, nn.Linear):
            yield 2.0 * part.in_features * part.out_features * factor, part.weight.requires_grad
        elif isinstance(part, Conv1D):  # GPT-2's
            yield 2.0 * part.nx * part.nf * factor, part.weight.requires_grad
        elif expert:  # all experts in one tensor [experts, in, out]
            for parameter in part.parameters(recurse=False):
                if len(shape := _shape(parameter)) == 3:
                    yield 2.0 * math.prod(shape) * factor, parameter.requires_grad


def _shape(tensor: torch.Tensor) -> torch.Size:
    """Of the whole: ZeRO-3 keeps parameters in pieces, and their shapes beside them."""
    return getattr(tensor, "ds_shape", tensor.shape)


def _expert_share(text: Any) -> float:
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    return getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0


def _products(module: nn.Module, text: Any = None) -> float:
    return sum(flops for flops, _ in _linears(module, text))


def _counted(module: nn.Module, flows: bool, text: Any) -> float:
    """Forward and backward: the gradient of what went in where it is wanted, of weights if trained."""
    return sum(flops * (1 + flows + trained) for flops, trained in _linears(module, text))


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@lru_cache(maxsize=16)
def measured_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix multiplication on this device: the best that half a second finds."""
    device = torch.device(device)
    began, side, best = time.perf_counter(), 1024, 0.0
    while True:
        a = torch.randn(side, side, device=device).to(dtype)
        product_seconds(a)  # libraries load at their first call
        seconds = min(product_seconds(a) for _ in range(3))  # another process may have had the cores
        best = max(best, 2.0 * side**3 / seconds)
        left = MEASURE_SECONDS - (time.perf_counter() - began)
        if left <= 0:
            return best
        if side < LARGEST and 8 * 4 * seconds < left:
            side *= 2


def product_seconds(a: torch.Tensor) -> float:
    """Seconds of one product a @ a, of float[S, S]."""
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    torch.mm(a, a)
    wait()
    return max(time.perf_counter() - began, 1e-9)
