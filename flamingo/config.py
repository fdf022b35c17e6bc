"""FlamingoConfig: everything that fixes the architecture. Knows no other room."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# Fields with a fixed set of values.
CHOICES = {
    "resampler_activation": ("gelu", "relu", "squared_relu"),
    "resampler_qk_norm": ("none", "layer", "rms"),
    "cross_attention_ff": ("gelu", "relu", "squared_relu", "swiglu"),
    "cross_attention_norm": ("layer", "rms"),
    "cross_attention_qk_norm": ("none", "layer", "rms"),
    "attend_to": ("immediate", "previous"),
    "gate_shape": ("scalar", "channel"),
    "connector_norm": ("none", "layer", "rms"),
    "connector_activation": ("gelu", "relu", "squared_relu"),
}

ADDED_TOKENS = ("<|endofchunk|>", "<image>")  # the order of released OpenFlamingo tokenizers


class FlamingoVisionConfig(PreTrainedConfig):
    """The frozen encoder: where it comes from and what its patch grid looks like.

    source: file name in `flamingo/vision/` that builds it; name: its name there;
    width: channels of the grid; grid: (rows, columns) at `image_size` pixels;
    mean, std: RGB normalisation of pixels in [0, 1]; options: passed to the source.
    """

    model_type = "flamingo_vision"
    base_config_key = "vision_config"

    source: str = "timm"
    name: str = "tf_efficientnet_lite0"
    image_size: int = 224
    width: int = 1280
    grid: list[int] | tuple[int, ...] = (7, 7)
    mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    options: dict | None = None


class FlamingoConfig(PreTrainedConfig):
    """Architecture of a Flamingo: frozen encoder, resampler, gated blocks, frozen LM.

    Resampler (Alayrac et al. 2022, section 2.1): `resampler_*`; `resampler_width=None` means
    the encoder's width, another width adds one linear projection of the grid.
    `resampler_frames`: learned temporal embeddings for so many frames of a clip (0: pictures
    only); longer clips interpolate them. `resampler_spatial`: learned position embeddings of
    the encoder's grid, interpolated to grids of another size.
    Gated blocks (section 2.2): before LM layers `cross_attention_layers`, or, when that is
    None, before every layer i with i % cross_attention_every == cross_attention_offset.
    `cross_attention_ff`: a feed-forward with one of the activations, or "swiglu";
    `cross_attention_norm`: "layer" or "rms"; `*_qk_norm`: norm of queries and keys, per head;
    `attend_to`: "immediate" (the image just before a token) or "previous" (all before it in the
    document); `gate_shape`: one gate per block ("scalar") or one per channel ("channel").
    `gate_init` is the value of the gates' parameter: 0 starts at the untouched LM.
    `cross_attention_scale`: one factor per block for all that it adds; None: 1, as in the paper.
    `flamingo.create` sets it to the size of the LM's residual stream at the block, which in an LM
    of today grows a hundredfold from the first layer to the last.
    Other ways to join sight and language: `connector` makes the grid into vectors ("perceiver", "linear",
    "mlp", "pool", see `flamingo/connectors/`), `fusion` brings them into the LM ("cross_attention", or
    "prefix": they stand in the LM's input in the place of `<image>`, see `flamingo/fusions/`).
    `connector_norm` of the grid and `connector_activation` are those of "linear", "mlp" and "pool",
    `connector_grid` the (rows, columns) that "pool" leaves. `connector_scale`: a factor for the vectors of
    "prefix", which `flamingo.create` sets to the size of the LM's embeddings.
    Added tokens: `added_tokens` of them from id `first_added_token_id` on, among them the two that
    the model must know.

    Raises ValueError for a value that no architecture can have.
    """

    model_type = "flamingo"
    sub_configs = {"text_config": AutoConfig, "vision_config": FlamingoVisionConfig}  # type: ignore

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None

    connector: str = "perceiver"
    connector_norm: str = "layer"
    connector_activation: str = "gelu"
    connector_grid: list[int] | tuple[int, ...] = (4, 4)
    connector_scale: float = 1.0
    fusion: str = "cross_attention"

    resampler_depth: int = 6
    resampler_width: int | None = None
    resampler_heads: int = 8
    resampler_head_dim: int = 64
    resampler_latents: int = 64
    resampler_ff_mult: float = 4.0
    resampler_activation: str = "gelu"
    resampler_qk_norm: str = "none"
    resampler_frames: int = 0
    resampler_spatial: bool = False

    cross_attention_layers: list[int] | None = None
    cross_attention_every: int = 4
    cross_attention_offset: int = 0
    cross_attention_heads: int = 8
    cross_attention_head_dim: int = 64
    cross_attention_ff_mult: float = 4.0
    cross_attention_ff: str = "gelu"
    cross_attention_norm: str = "layer"
    cross_attention_qk_norm: str = "none"
    cross_attention_eps: float = 1e-5
    attend_to: str = "immediate"
    gate_shape: str = "scalar"
    cross_attention_scale: list[float] | None = None
    gate_init: float = 0.0

    added_tokens: int = 2
    first_added_token_id: int = -1
    end_of_chunk_token_id: int = -1
    image_token_id: int = -1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if self.vision_config is None:
            self.vision_config = FlamingoVisionConfig()
        elif isinstance(self.vision_config, dict):
            self.vision_config = FlamingoVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)
        self._check()

    def get_text_config(self, decoder=None, encoder=None) -> Any:
        """The LM's config: generation caches take their number of layers from it."""
        return self if self.text_config is None else self.text_config

    @property
    def block_positions(self) -> list[int]:
        """LM layers that get a block before them, ascending, if the fusion has any (`fusions.positions`)."""
        layers = self.get_text_config().num_hidden_layers
        if self.cross_attention_layers is not None:
            return sorted(self.cross_attention_layers)
        every, offset = self.cross_attention_every, self.cross_attention_offset
        return [i for i in range(layers) if i % every == offset]

    def _check(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}")
        positive = (
            "resampler_depth resampler_heads resampler_head_dim resampler_latents resampler_ff_mult "
            "cross_attention_every cross_attention_heads cross_attention_head_dim cross_attention_ff_mult "
            "added_tokens"
        )
        for name in positive.split():
            number = getattr(self, name)
            if not isinstance(number, (int, float)) or number <= 0:
                raise ValueError(f"{name}={number!r}: must be a number above 0")
        if self.resampler_frames < 0:
            raise ValueError(f"resampler_frames={self.resampler_frames}: must be at least 0")
        if not 0 <= self.cross_attention_offset < self.cross_attention_every:
            raise ValueError(
                f"cross_attention_offset={self.cross_attention_offset}: must be at least 0 and "
                f"below cross_attention_every={self.cross_attention_every}"
            )
        few = self.connector_grid
        if len(few) != 2 or not all(isinstance(n, int) and n > 0 for n in few):
            raise ValueError(f"connector_grid={list(few)}: must be rows and columns, two numbers above 0")
        if self.connector_scale <= 0:
            raise ValueError(f"connector_scale={self.connector_scale}: must be above 0")
        # transformers builds an empty config to find the defaults.
        if self.fusion != "prefix" and self.text_config is not None:
            self._check_blocks()

    def _check_blocks(self):
        layers, positions = self.get_text_config().num_hidden_layers, self.block_positions
        bad = [i for i in positions if not 0 <= i < layers]
        if bad or not positions or len(set(positions)) != len(positions):
            raise ValueError(
                f"cross_attention_layers={positions}: needs one or more different layers in "
                f"0..{layers - 1}, the layers of the language model"
            )
        scales = self.cross_attention_scale
        if scales is not None and (len(scales) != len(positions) or min(scales) <= 0):
            raise ValueError(
                f"cross_attention_scale={scales}: needs one number above 0 for each of the "
                f"{len(positions)} gated blocks, or None"
            )
