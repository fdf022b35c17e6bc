"""Vision towers of Hugging Face transformers: CLIP, SigLIP, SigLIP 2, DINOv2 and their kin.

A name is one of the hub's or a local folder, as for `AutoModel`. Of a checkpoint that holds more
than a vision tower (CLIP, LLaVA) the tower is taken. No code of a repository is ever run. What is
asked of a tower is its structure, not its class: one square picture in, a `last_hidden_state` out
that is a patch grid (float[N, T, E], class and register tokens first) or a feature map
(float[N, E, h, w]).

N images, H, W pixels, h, w rows and columns, T tokens, E channels, G grid positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.utils import constants

from flamingo.config import FlamingoVisionConfig

# Normalisation (mean, std) by the first part of the model type, where no image processor says it.
OPENAI = (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD)
IMAGENET = (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
HALF = (constants.IMAGENET_STANDARD_MEAN, constants.IMAGENET_STANDARD_STD)
NORMALISATION = {"clip": OPENAI, "siglip": HALF, "siglip2": HALF, "dinov2": IMAGENET, "dinov3": IMAGENET}
# Fields of a tower's config that say nothing about its architecture; labels can be a thousand.
NOT_KEPT = {"transformers_version", "architectures", "_name_or_path", "dtype", "auto_map", "id2label"}
NOT_KEPT |= {"label2id", "output_hidden_states", "output_attentions", "return_dict"}


class TransformersEncoder(nn.Module):
    """float[N, 3, H, W] normalised pixels -> float[N, G, E], patch tokens after one layer.

    The tower is cut down to what the tokens need: no layer after `layer`, no pooling head, and
    its final norm only where `final_norm` asks for it, as a part of its own.

    Raises ValueError for a layer or a norm that the tower does not have.
    """

    model: Any  # the library's own module

    def __init__(self, tower: nn.Module, *, layer: int, final_norm: bool, prefix_tokens: int):
        super().__init__()
        self.prefix_tokens = prefix_tokens  # class and register tokens, which come first
        _drop_pooling(tower)
        _drop_layers_after(tower, layer)
        name = _final_norm(tower)
        if final_norm and name is None:
            raise ValueError(f"final_norm=True: {type(tower).__name__} has no final norm; set it to False")
        self.norm = tower.get_submodule(name) if final_norm and name else None
        if name:
            # What is left returns tokens before the norm, whether it is one that applies it (SigLIP,
            # DINOv2) or one that keeps it for the class token (CLIP).
            setattr(tower, name, nn.Identity())
        self.model = tower
        self._takes = _arguments(tower)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.model(**_inputs(self.model, self._takes, pixel_values)).last_hidden_state
        if hidden.ndim == 4:  # a feature map
            hidden = rearrange(hidden, "n e h w -> n (h w) e")
        else:
            hidden = hidden[:, self.prefix_tokens :]
        return hidden if self.norm is None else self.norm(hidden)


def describe(
    name: str,
    *,
    image_size: int | None = None,
    layer: int = -1,
    final_norm: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FlamingoVisionConfig:
    """Read width, grid and normalisation off the tower's config, without its weights.

    image_size: pixels, None: what its image processor makes, or the tower's own size; layer: -1
    the last, -2 the one before (LLaVA's choice), and so on; final_norm: whether the tower's final
    norm is applied to the tokens, None: as in its own `last_hidden_state` for the last layer, not
    for others; mean, std: RGB normalisation, None: the image processor's, or the family's.

    Raises ValueError for a name that is no vision tower, and for options that it cannot have.
    """
    fields = _tower_fields(name)
    with torch.device("meta"):  # shapes only
        tower = _tower(name, fields)
        processor = _image_processor(name)
        size = image_size or _side_of(processor) or _native_side(name, fields)
        shape, normed = _probe(name, tower, size)
        width, grid, prefix_tokens = _grid(name, shape, size, fields.get("patch_size"))
        mean, std = _normalisation(name, fields["model_type"], processor, mean, std)
        config = FlamingoVisionConfig(
            source="transformers",
            name=name,
            image_size=size,
            width=width,
            grid=grid,
            mean=mean,
            std=std,
            options={
                "tower": fields,
                "layer": layer,
                "final_norm": (normed and layer == -1) if final_norm is None else final_norm,
                "prefix_tokens": prefix_tokens,
            },
        )
        build(config)  # refuses options that the tower cannot have
    return config


def build(config: FlamingoVisionConfig) -> TransformersEncoder:
    """The encoder with random weights, from what is kept in `options`."""
    options = dict(config.options or {})
    return TransformersEncoder(_tower(config.name, options.pop("tower")), **options)


def load(encoder: nn.Module, name: str) -> None:
    """Pretrained weights into a built encoder.

    Raises ValueError when the folder or repository has no weights, or not those of this tower.
    """
    try:
        model, report = AutoModel.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"transformers:{name}: no weights could be read: {_first_line(error)}") from error
    cut: Any = encoder.model
    tower: Any = next((module for module in model.modules() if type(module) is type(cut)), None)
    if tower is None:
        raise ValueError(f"transformers:{name}: a {type(model).__name__} has no {type(cut).__name__} in it")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = TransformersEncoder(
        tower,
        layer=len(_layers(cut)) - len(_layers(tower)) - 1,
        final_norm=encoder.norm is not None,
        prefix_tokens=0,
    )
    kept = {id(parameter) for parameter in given.parameters()}
    missing = [key for key in report["missing_keys"] if id(parameters.get(key)) in kept]
    if missing:
        raise ValueError(f"transformers:{name}: weights lack {len(missing)} tensors, the first: {missing[0]}")
    encoder.load_state_dict(given.state_dict())


# -- the tower: what it is ------------------------------------------------------------------


def _tower_fields(name: str) -> dict:
    """The config of the vision tower under this name, as plain fields."""
    try:
        if "/" not in name and not Path(name).is_dir():
            raise OSError("write OWNER/NAME, e.g. openai/clip-vit-large-patch14, or the folder's path")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"vision name {name!r}: neither a model of the Hugging Face hub nor a folder with its "
            f"config.json: {_first_line(error)}"
        ) from error
    config = getattr(config, "vision_config", None) or config
    fields = config.to_dict()
    return {key: value for key, value in fields.items() if key not in NOT_KEPT}


def _tower(name: str, fields: dict) -> nn.Module:
    """The tower with random weights. Raises ValueError when it is none."""
    fields = dict(fields)
    kind = fields.pop("model_type")
    try:
        tower = AutoModel.from_config(AutoConfig.for_model(kind, **fields), trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"vision name {name!r}: AutoModel cannot build a {kind}: {_first_line(error)}"
        ) from error
    if tower.main_input_name != "pixel_values":
        raise ValueError(
            f"vision name {name!r}: {type(tower).__name__} is no vision tower, it takes "
            f"{tower.main_input_name}; name an image model such as openai/clip-vit-large-patch14"
        )
    return tower


def _probe(name: str, tower: nn.Module, size: int) -> tuple[torch.Size, bool]:
    """The shape of the tower's output, and whether it has applied its final norm to it."""
    _drop_pooling(tower)
    normed: list[bool] = []
    if norm := _final_norm(tower):
        # CLIP gives its final norm the class token alone: float[N, E].
        tower.get_submodule(norm).register_forward_hook(lambda _, given, __: normed.append(given[0].ndim > 2))
    try:
        out = tower(**_inputs(tower, _arguments(tower), torch.empty(1, 3, size, size)))
        return out.last_hidden_state.shape, any(normed)
    except Exception as error:  # whatever a tower makes of a picture that it was not made for
        raise ValueError(
            f"vision name {name!r}: its {type(tower).__name__} makes no patch grid of one picture with "
            f"image_size={size}: {_first_line(error)}; name another image_size or another model"
        ) from error


def _grid(name: str, shape: torch.Size, size: int, patch: Any) -> tuple[int, list[int], int]:
    """Width, (rows, columns) and the number of tokens before the grid, of an output's shape."""
    if len(shape) == 4:
        return shape[1], [shape[2], shape[3]], 0
    tokens, side = shape[1], isqrt(shape[1])
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if patch and (size // patch) ** 2 <= tokens:
        side = size // patch
    elif side * side != tokens:  # neither one token for each patch nor, as in Swin, for each few
        raise ValueError(
            f"vision name {name!r}: its {tokens} tokens are no square grid of a picture of {size} pixels; "
            "name a model that returns every patch"
        )
    return shape[2], [side, side], tokens - side * side


def _arguments(tower: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(tower.forward).parameters)


def _inputs(tower: Any, takes: frozenset[str], pixel_values: Tensor) -> dict[str, Any]:
    """float[N, 3, H, W] as the arguments that a tower takes."""
    if "spatial_shapes" not in takes:
        # At the tower's own size this changes nothing.
        interpolate = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        return {"pixel_values": pixel_values, **interpolate}
    # SigLIP 2 of any aspect (NaFlex): pictures come as rows of flattened patches. Here all have the
    # same size, so there is no padding to mask.
    p = tower.config.patch_size
    h, w = (side // p for side in pixel_values.shape[-2:])
    pixel_values = pixel_values[..., : h * p, : w * p]
    patches = rearrange(pixel_values, "n c (h p) (w q) -> n (h w) (p q c)", p=p, q=p)
    # On the CPU, also for another device: the model reads these numbers one by one.
    shapes = torch.tensor([[h, w]] * len(patches), device="cpu")
    return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}


# -- the tower: its parts, found by structure -------------------------------------------------


def _layers(tower: nn.Module) -> nn.ModuleList:
    """The stack of layers or stages: the list with the most parameters."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(tower).__name__} is no vision tower: it has no list of layers")
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))


def _final_norm(tower: nn.Module) -> str | None:
    """Name of the norm that comes after the layers in the tower's own list of parts."""
    layers, after, found = _layers(tower), False, None
    for name, child in tower.named_children():
        if any(module is layers for module in child.modules()):
            after = True
        elif after and "Norm" in type(child).__name__:
            found = name
    return found


def _drop_pooling(tower: Any) -> None:
    """Take out what makes one vector of the tokens: nothing of it reaches them."""
    if getattr(tower, "use_head", False):  # SigLIP, AIMv2
        tower.use_head = False
        del tower.head
    pooler = getattr(tower, "pooler", None)
    if pooler is not None and any(True for _ in pooler.parameters()):  # ViT
        tower.pooler = None


def _drop_layers_after(tower: nn.Module, layer: int) -> None:
    layers = _layers(tower)
    if not -len(layers) <= layer <= -1:
        raise ValueError(f"layer={layer}: {type(tower).__name__} has layers -{len(layers)}..-1, -1 the last")
    shapes = {tuple(p.shape for p in module.parameters()) for module in layers}
    if layer != -1 and len(shapes) > 1:
        raise ValueError(
            f"layer={layer}: the stages of {type(tower).__name__} differ in width; only -1, the last, is one"
        )
    del layers[len(layers) + layer + 1 :]


# -- pictures as the tower wants them ---------------------------------------------------------


def _image_processor(name: str) -> Any:
    """The image processor that comes with a name, None where there is none."""
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def _side_of(processor: Any) -> int | None:
    """Pixels on a side of what an image processor makes; None if it does not say."""
    names = ("crop_size", "size") if getattr(processor, "do_center_crop", False) else ("size",)
    for size in (getattr(processor, name, None) for name in names):
        for key in ("height", "shortest_edge"):
            side = size if isinstance(size, int) else dict(size or {}).get(key)
            if side:
                return int(side)
    return None


def _native_side(name: str, fields: dict) -> int:
    """Pixels on a side of the pictures that a tower was made for."""
    size = fields.get("image_size")
    if size is None and fields.get("num_patches"):  # SigLIP 2: patches of a square picture
        return isqrt(fields["num_patches"]) * fields["patch_size"]
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise ValueError(
            f"vision name {name!r}: its config says image_size={size}; choose the side of a square in "
            "pixels with the option image_size"
        )
    return int(sides.pop())


def _normalisation(
    name: str, kind: str, processor: Any, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and std of RGB: as asked for, else of the image processor, else of the family."""
    known: Any = NORMALISATION.get(kind.partition("_")[0])
    if processor is not None:
        known = (getattr(processor, "image_mean", None), getattr(processor, "image_std", None))
        if not getattr(processor, "do_normalize", True) or None in known:
            known = ((0.0,) * 3, (1.0,) * 3)  # pixels in [0, 1] as they are
    if known is None and (mean is None or std is None):
        raise ValueError(
            f"vision name {name!r}: no preprocessor_config.json, and how pictures are normalised for "
            f"{kind} is not known here; give the options mean and std"
        )
    known = known or (mean, std)
    return list(mean or known[0]), list(std or known[1])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
