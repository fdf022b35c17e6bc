"""FlamingoForConditionalGeneration: encoder -> resampler -> gated blocks in a frozen LM.

B rows, T tokens, N images of all rows, G grid positions, E encoder width, L latents,
W LM width, V vocabulary with the added tokens, M supervised positions.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import ModelOutput

from flamingo import connectors, fusions, vision
from flamingo.cache import SightLayer
from flamingo.config import FlamingoConfig
from flamingo.cross_attention import GatedCrossAttentionBlock
from flamingo.decoder import AddedTokens, Decoder
from flamingo.expansion import Expanded, expand, rows_of
from flamingo.freezing import FrozenParts, grad_if
from flamingo.generation import FlamingoGeneration
from flamingo.media import filled_up, restarting_positions, sight
from flamingo.nll import loss_of


@dataclass
class FlamingoOutput(ModelOutput):
    """loss: float[] mean over supervised tokens, float[M] with reduction="none"; logits: float[B, T, V],
    or float[1, M, V] of the supervised positions when labels are given (None: `skip_logits`); log_sums:
    float32[M], the log-sum-exp of each row of logits that were skipped."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None
    hidden_states: Any = None
    attentions: Any = None
    log_sums: Tensor | None = None


class FlamingoPreTrainedModel(PreTrainedModel):
    config: FlamingoConfig  # type: ignore[assignment]
    config_class = FlamingoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Projections by their fan-in, tables by `initializer_range`.

        With fan-in the blocks' nonlinearities work from the start: at a fifth of it attention is
        nearly uniform and GELU nearly linear, and a word and a picture cannot be compared.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "attention_map") and hasattr(module, "reset"):  # a connector
            module.reset(std)  # type: ignore[operator]
        elif isinstance(module, AddedTokens):
            nn.init.normal_(module.input, std=std)
            nn.init.normal_(module.output, std=std)
        elif isinstance(module, GatedCrossAttentionBlock):
            nn.init.constant_(module.attn_gate, self.config.gate_init)
            nn.init.constant_(module.ff_gate, self.config.gate_init)

    @torch.no_grad()
    def _restore_tables(self) -> None:
        """Loading leaves buffers that no checkpoint holds (position tables) uninitialised."""
        encoder: nn.Module = self.vision_encoder  # type: ignore[assignment]
        hidden = {name for name, _ in encoder.named_buffers()} - set(encoder.state_dict())
        if hidden:
            fresh = vision.build(self.config.vision_config)  # type: ignore[arg-type]
            for name in hidden:
                encoder.get_buffer(name).copy_(fresh.get_buffer(name))


# GenerationMixin is named here too: transformers looks for it among the direct bases.
class FlamingoForConditionalGeneration(
    FrozenParts, FlamingoGeneration, FlamingoPreTrainedModel, GenerationMixin
):
    """A frozen LM that sees: only resampler, gated blocks and added tokens are trained, unless
    `unfreeze` adds to them."""

    def __init__(self, config: FlamingoConfig, language_model: nn.Module | None = None):
        """language_model: one that is there already, in place of a new one with random weights."""
        super().__init__(config)
        text = config.get_text_config()
        self.vision_encoder = vision.build(config.vision_config)  # type: ignore[arg-type]
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(
            text, trust_remote_code=False
        )
        tables = (self.get_input_embeddings(), self.get_output_embeddings())
        # Of a table that lies in pieces on several ranks, only `ds_shape` tells the size.
        shapes = [getattr(table.weight, "ds_shape", table.weight.shape) for table in tables]
        self._fusion = fusions.fusion(config.fusion).Fusion(config)
        # Named so in all checkpoints, whichever connector it is.
        self.resampler: Any = connectors.build(config, self._fusion.width(shapes[0][1]))
        self.gated_blocks = self._fusion.blocks(config, text.hidden_size, self.resampler.width)
        self.added_tokens = AddedTokens(config.added_tokens, *(shape[1] for shape in shapes))
        takes = inspect.signature(self.language_model.forward).parameters
        self._takes_positions = "position_ids" in takes  # ALiBi models have none
        self._decoder = Decoder(config, self, fusions.positions(config))
        self.freeze()
        if language_model is not None:
            for part in (*language_model.modules(), *language_model.parameters()):
                part._is_hf_initialized = True  # type: ignore[attr-defined]  # or its weights were drawn anew
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; what is frozen is frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze()
        model._restore_tables()
        return loaded

    # -- embeddings: the LM's own --------------------------------------------------------

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    # -- sight ---------------------------------------------------------------------------

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """float[N, 3, H, W] normalised pixels -> float[N, G, E] patch grids of the encoder;
        clips float[N, F, 3, H, W] -> float[N, F, G, E]. No gradients while the encoder is frozen.

        Raises ValueError when the grid is not the one in `vision_config`, or for a picture of
        another size does not follow from it.
        """
        if pixel_values.ndim == 5:
            flat = self.encode_images(rearrange(pixel_values, "n f c h w -> (n f) c h w"))
            return rearrange(flat, "(n f) g e -> n f g e", n=len(pixel_values))
        dtype = next(self.vision_encoder.parameters()).dtype
        wanted = "vision_encoder" in self._unfrozen
        with torch.autocast(pixel_values.device.type, enabled=False), grad_if(wanted):
            grid = self.vision_encoder(pixel_values.to(dtype))
        config: Any = self.config.vision_config
        rows, columns = self.grid_shape(pixel_values)
        if grid.shape[1:] != (rows * columns, config.width):
            raise ValueError(
                f"the encoder made a grid of {grid.shape[1]} places x {grid.shape[2]} channels, "
                f"vision_config.grid={list(config.grid)} and width={config.width} say "
                f"{rows * columns} x {config.width} for pictures of {tuple(pixel_values.shape[-2:])} "
                f"pixels (vision_config.image_size={config.image_size})"
            )
        return grid

    def grid_shape(self, pixel_values: Tensor) -> tuple[int, int]:
        """(rows, columns) of the grid of pictures or clips of this size."""
        config: Any = self.config.vision_config
        height, width = pixel_values.shape[-2:]
        rows, columns = config.grid
        return (round(rows * height / config.image_size), round(columns * width / config.image_size))

    def media(
        self,
        *,
        pixel_values: Tensor | None = None,
        grids: Tensor | None = None,
        latents: Tensor | None = None,
        frames: Tensor | None = None,
        grid_shape: tuple[int, int] | None = None,
    ) -> Any:
        """Images as the LM gets them (`fusions`; as gated blocks need them), from one of three stages.

        pixel_values: float[N, 3, H, W], clips float[N, F, 3, H, W]; grids: float[N, G, E] or
        float[N, F, G, E] (`encode_images`), with their grid_shape where it is not the config's;
        latents: float[N, L, W] (the resampler's); frames: int64[N], frames of a clip that count,
        from the first on (None: all). Keys and values are projected here, once per image,
        whatever the number of tokens that will look at it.
        """
        if latents is None:
            if grids is None:
                assert pixel_values is not None, "media() needs pixel_values, grids or latents"
                grids, grid_shape = self.encode_images(pixel_values), self.grid_shape(pixel_values)
            latents = self.resampler(grids, frames, grid_shape)
        assert latents is not None
        return self._fusion.media(self.gated_blocks, latents)

    @property
    def image_tokens(self) -> int:
        """<image> tokens of an image in the LM's input: 1, or with `fusion="prefix"` one per vector."""
        return self._fusion.image_tokens(self.resampler.count)

    @property
    def image_values(self) -> int:
        """Numbers that `media()` keeps of an image."""
        return self._fusion.values(self.config, self.resampler.count, self.resampler.width)

    def expand(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Expanded:
        """Rows with one <image> token an image, as the LM reads them (`expansion.expand`)."""
        token, pad = self.config.image_token_id, self.generation_config.pad_token_id or 0
        if labels is not None:  # nothing predicts the first token, wherever it will stand
            labels = torch.cat((torch.full_like(labels[:, :1], -100), labels[:, 1:]), dim=1)
        return expand(input_ids, token, self.image_tokens, attention_mask, segment_ids, labels, pad)

    def is_short(self, input_ids: Tensor, media: Any) -> bool:
        """Whether images have one token each here and more in the LM's input: rows to be expanded."""
        wanted = int((input_ids == self.config.image_token_id).sum()) if self.image_tokens > 1 else 0
        return bool(wanted) and media is not None and wanted * self.image_tokens == len(media)

    def sight(
        self,
        input_ids: Tensor,
        media: Any,
        segment_ids: Tensor | None = None,
        look_ahead: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Which images each token sees (`media.sight`), once their number is checked.

        Raises ValueError where <image> tokens and images differ in number.
        """
        token = self.config.image_token_id
        wanted = int((input_ids == token).sum())
        given = 0 if media is None else len(media)
        if wanted != given:
            raise ValueError(
                f"{wanted} <image> tokens in input_ids but {given // self.image_tokens} images in "
                "pixel_values: every <image> needs one picture, in the same order"
            )
        return sight(input_ids, token, self.config.attend_to, segment_ids, look_ahead)

    # -- forward -------------------------------------------------------------------------

    # transformers 5.24 renamed it; passed on under its old name, the images in it would be lost.
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        media: Any = None,
        frames: Tensor | None = None,
        seen: Tensor | None = None,
        since: Tensor | None = None,
        look_ahead: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        reduction: str = "mean",
        logits_to_keep: int = 0,
        skip_logits: bool = False,
        cache: Any = None,
        **kwargs,
    ) -> FlamingoOutput:
        """One pass over B rows of T tokens.

        input_ids, attention_mask: int64[B, T]; pixel_values: float[N, 3, H, W], the images in
        the order of the <image> tokens, row by row, or clips float[N, F, 3, H, W], of whose frames
        frames: int64[N] count; media: the same images already encoded (`media()`); seen, since:
        int64[B, T], the images of each token where the ids alone cannot tell (generation with a
        cache); look_ahead: bool[B, T], tokens that see the next image instead (p_next);
        position_ids: int64[B, T], for LMs that take them; segment_ids: int64[B, T], the document
        of each token where rows are packed (instead of attention_mask and position_ids; see
        `packs`); labels: int64[B, T], -100 where nothing is predicted, shifted inside; reduction:
        "mean", "sum" or "none" (float[M], row by row); logits_to_keep: without labels, logits of
        so many last positions only (0: all); skip_logits: with labels, a model that `skips_logits` makes
        them a few at a time for the loss alone; cache: the LM's cache, which holds the images too: new
        tokens see those before. The LM gets the rest. Raises ValueError for images without their tokens.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing: a Flamingo finds its images by their tokens")
        if media is None and pixel_values is not None and len(pixel_values):
            media = self.media(pixel_values=pixel_values, frames=frames)
        long: Expanded | None = None
        if seen is None:
            if self.is_short(input_ids, media):
                assert position_ids is None and look_ahead is None, "not for rows that are expanded"
                long = self.expand(input_ids, attention_mask, segment_ids, labels)
                input_ids, labels, segment_ids = long.input_ids, long.labels, long.segment_ids
                attention_mask, position_ids = long.mask_and_positions()
            seen, since = self.sight(input_ids, media, segment_ids, look_ahead)
            held = SightLayer.of(cache)
            if held is not None:
                media, seen, since = held.then(media, seen, since)
        keep, targets = _kept(input_ids, labels, logits_to_keep, long)
        if targets is not None:
            kwargs.setdefault("use_cache", False)
        if segment_ids is not None:
            # transformers tells packed documents by positions that restart, without mask and cache.
            assert attention_mask is None and self._takes_positions, "these rows cannot be packed"
            position_ids = restarting_positions(segment_ids)
            kwargs["use_cache"] = False
        if position_ids is not None and self._takes_positions:
            kwargs["position_ids"] = position_ids
        if cache is not None:
            kwargs["cache"] = cache
        slot = self._fusion.conditioning(media, input_ids, seen, since, keep)
        slot.targets = targets if skip_logits and self.skips_logits else None
        with self._decoder.conditioned(slot):
            out = self.language_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if self._fusion.kept:
            SightLayer.keep(out.cache, media, seen, since)
        loss, logits = None, out.logits
        if targets is not None:
            loss, logits = loss_of(slot.nll, logits, targets, reduction)
        elif keep is not None:
            logits = rearrange(logits, "1 (b k) v -> b k v", b=len(input_ids))
        elif long is not None:
            logits = rows_of(logits, long.last)
        return FlamingoOutput(loss=loss, logits=logits, cache=out.cache, log_sums=slot.log_sums)

    @torch.no_grad()
    def packs(self) -> bool:
        """Whether documents in one row stay apart in this LM: asked of the LM itself.

        What stands before must not change a document at all, and alone it must be the same.
        """
        if not self._takes_positions:
            return False
        ids = torch.arange(1, 13, device=self.device)[None] % self.config.first_added_token_id
        segments = (torch.arange(12, device=self.device) >= 5).long()[None]
        other = torch.cat((ids[:, 5:10].flip(1), ids[:, 5:]), dim=1)
        row, changed = (self(x, segment_ids=segments).logits[:, 5:].float() for x in (ids, other))
        alone = self(ids[:, 5:], use_cache=False).logits.float()
        # bfloat16 rounds differently in matrices of another height.
        return torch.equal(row, changed) and bool((row - alone).norm() < 0.05 * alone.norm())

    # -- where it looks ------------------------------------------------------------------

    @torch.no_grad()
    def attention_maps(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor:
        """Where each token looks on the image that it sees: float32[B, T, P].

        P are the G places of the grid, for clips those of F frames (P = F * G). With
        `attend_to="previous"` or `fusion="prefix"` float32[B, T, N, P], over all images. The gated
        blocks' attention to the latents, weighted by how far each block's gate is open (|tanh|), or
        the LM's own to the vectors, composed with the connector's of vectors to grid places. The
        places of a token sum to 1, or are 0 where it sees no image. The logits of a token are made at
        the position *before* it: look there for where the model looked when it chose a token.
        """
        if not len(pixel_values):
            self.sight(input_ids, None)
            return torch.zeros(*input_ids.shape, math.prod(self.config.vision_config.grid))  # type: ignore
        grids, shape = self.encode_images(pixel_values), self.grid_shape(pixel_values)
        media = self.media(grids=grids, frames=frames, grid_shape=shape)
        ids, mask, last = input_ids, attention_mask, None
        if self.is_short(input_ids, media):
            long = self.expand(input_ids, attention_mask)
            ids, mask, last = long.input_ids, long.attention_mask, long.last
        seen, since = self.sight(ids, media)
        places = self.resampler.attention_map(grids, frames, shape)  # [N, L, P]
        maps = self._fusion.looks(self, ids, mask, seen, since, media, places)
        if last is None:
            return maps
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        return maps[rows, last]


def _kept(
    input_ids: Tensor, labels: Tensor | None, logits_to_keep: int, long: Expanded | None
) -> tuple[Tensor | None, Tensor | None]:
    """int64[M'], which of the B*T positions' logits are wanted, None: all; int64[M] of what the first
    of them predict, the others fill up (`media.filled_up`); None without labels."""
    if labels is not None:
        targets = rearrange(F.pad(labels[:, 1:], (0, 1), value=-100), "b t -> (b t)")
        supervised, keep = filled_up(targets != -100)
        return keep, targets[supervised]
    if not logits_to_keep:
        return None, None
    last = torch.arange(input_ids.shape[1], device=input_ids.device)[-logits_to_keep:]
    last = last.expand(len(input_ids), -1) if long is None else long.last[:, -logits_to_keep:]
    row = torch.arange(len(input_ids), device=input_ids.device)[:, None]
    return (row * input_ids.shape[1] + last).flatten(), None
