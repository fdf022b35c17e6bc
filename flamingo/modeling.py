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
from transformers.utils.generic import ModelOutput

from flamingo import vision
from flamingo.config import FlamingoConfig
from flamingo.cross_attention import GatedCrossAttentionBlock, Media
from flamingo.decoder import AddedTokens, Conditioning, Decoder
from flamingo.media import Runs, image_offsets, immediate_image, restarting_positions
from flamingo.resampler import PerceiverResampler


@dataclass
class FlamingoOutput(ModelOutput):
    """loss: float[] mean over supervised tokens, float[M] with reduction="none";
    logits: float[B, T, V], or float[1, M, V] of the supervised positions when labels are given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None


class FlamingoPreTrainedModel(PreTrainedModel):
    config: FlamingoConfig  # type: ignore[assignment]
    config_class = FlamingoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    _supports_sdpa = True
    _supports_flash_attn = True

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
        elif isinstance(module, PerceiverResampler):
            nn.init.normal_(module.latents)
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


class FlamingoForConditionalGeneration(FlamingoPreTrainedModel, GenerationMixin):
    """A frozen LM that sees: only resampler, gated blocks and added tokens are trained."""

    def __init__(self, config: FlamingoConfig):
        super().__init__(config)
        text = config.get_text_config()
        self.vision_encoder = vision.build(config.vision_config)  # type: ignore[arg-type]
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.resampler = PerceiverResampler(config)
        self.gated_blocks = nn.ModuleList(
            GatedCrossAttentionBlock(config, text.hidden_size, self.resampler.width, scale)
            for scale in config.cross_attention_scale or [1.0] * len(config.block_positions)
        )
        tables = (self.get_input_embeddings(), self.get_output_embeddings())
        self.added_tokens = AddedTokens(2, *(table.weight.shape[1] for table in tables))
        takes = inspect.signature(self.language_model.forward).parameters
        self._takes_positions = "position_ids" in takes  # ALiBi models have none
        self._decoder = Decoder(config, self.language_model, self.gated_blocks, self.added_tokens)
        self.freeze()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; what is frozen is frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze()
        model._restore_tables()
        return loaded

    # -- what is frozen ------------------------------------------------------------------

    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules that training changes, by name; everything else stays as it is."""
        names = ("resampler", "gated_blocks", "added_tokens")
        return {name: getattr(self, name) for name in names}

    def freeze(self) -> None:
        """No gradient for the encoder and the LM."""
        self.vision_encoder.requires_grad_(False)
        self.language_model.requires_grad_(False)

    def train(self, mode: bool = True):
        """Frozen means frozen: the encoder and the LM stay in eval mode (no dropout)."""
        super().train(mode)
        self.vision_encoder.eval()
        self.language_model.eval()
        return self

    # -- embeddings: the LM's own --------------------------------------------------------

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    # -- sight ---------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """float[N, 3, H, W] normalised pixels -> float[N, G, E] patch grids of the frozen encoder.

        Raises ValueError when the grid is not the one in `vision_config`.
        """
        dtype = next(self.vision_encoder.parameters()).dtype
        with torch.autocast(pixel_values.device.type, enabled=False):
            grid = self.vision_encoder(pixel_values.to(dtype))
        config: Any = self.config.vision_config
        places = config.grid[0] * config.grid[1]
        if grid.shape[1:] != (places, config.width):
            raise ValueError(
                f"the encoder made a grid of {grid.shape[1]} places x {grid.shape[2]} channels, "
                f"vision_config.grid={list(config.grid)} and width={config.width} say "
                f"{places} x {config.width}; images must be {config.image_size} pixels wide"
            )
        return grid

    def media(
        self,
        *,
        pixel_values: Tensor | None = None,
        grids: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> Media:
        """Images as the gated blocks need them, from one of three stages.

        pixel_values: float[N, 3, H, W]; grids: float[N, G, E] (`encode_images`); latents:
        float[N, L, W] (the resampler's). Keys and values are projected here, once per image,
        whatever the number of tokens that will look at it.
        """
        if latents is None:
            if grids is None:
                assert pixel_values is not None, "media() needs pixel_values, grids or latents"
                grids = self.encode_images(pixel_values)
            latents = self.resampler(grids)
        assert latents is not None
        pairs = [block.attn.project_media(latents) for block in self.gated_blocks]  # type: ignore
        return Media(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), latents)

    def _seen(
        self, input_ids: Tensor, media: Media | None, segment_ids: Tensor | None = None
    ) -> Tensor:
        token = self.config.image_token_id
        wanted = int((input_ids == token).sum())
        given = 0 if media is None else len(media)
        if wanted != given:
            raise ValueError(
                f"{wanted} <image> tokens in input_ids but {given} images in pixel_values: "
                "every <image> needs one picture, in the same order"
            )
        return immediate_image(input_ids, token, image_offsets(input_ids, token), segment_ids)

    # -- forward -------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        media: Media | None = None,
        seen: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        reduction: str = "mean",
        logits_to_keep: int = 0,
        **kwargs,
    ) -> FlamingoOutput:
        """One pass over B rows of T tokens.

        input_ids, attention_mask: int64[B, T]; pixel_values: float[N, 3, H, W], the images in
        the order of the <image> tokens, row by row; media: the same images already encoded
        (`media()`); seen: int64[B, T], the image of each token where the ids alone cannot tell
        (generation with a cache); position_ids: int64[B, T], for LMs that
        take them; segment_ids: int64[B, T], the document of each token where rows are packed
        (instead of attention_mask and position_ids; see `packs`); labels: int64[B, T], -100 where nothing is predicted, shifted
        inside; reduction: "mean", "sum" or "none" (float[M], row by row); logits_to_keep: without
        labels, logits of so many last positions only (0: of all), as in transformers.
        Other arguments go to the LM. Raises ValueError for images that do not match the tokens.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing: a Flamingo finds its images by their tokens")
        if media is None and pixel_values is not None and len(pixel_values):
            media = self.media(pixel_values=pixel_values)
        if seen is None:
            seen = self._seen(input_ids, media, segment_ids)
        keep = targets = None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            keep = targets != -100
            kwargs.setdefault("use_cache", False)
        elif logits_to_keep:
            keep = torch.zeros_like(input_ids, dtype=torch.bool)
            keep[:, -logits_to_keep:] = True
        if segment_ids is not None:
            # transformers tells packed documents by positions that restart, without mask and cache.
            assert attention_mask is None and self._takes_positions, "these rows cannot be packed"
            position_ids = restarting_positions(segment_ids)
            kwargs["use_cache"] = False
        if position_ids is not None and self._takes_positions:
            kwargs["position_ids"] = position_ids
        conditioning = Conditioning(Runs.of(seen), media, keep)
        with self._decoder.conditioned(conditioning):
            out = self.language_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        loss, logits = None, out.logits
        if targets is not None and keep is not None:
            assert reduction in ("mean", "sum", "none"), reduction
            loss = F.cross_entropy(logits[0].float(), targets[keep], reduction=reduction)
        elif keep is not None:
            logits = rearrange(logits, "1 (b k) v -> b k v", b=len(input_ids))
        return FlamingoOutput(loss=loss, logits=logits, past_key_values=out.past_key_values)

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

    # -- generation ----------------------------------------------------------------------

    def generate(self, inputs=None, *, pixel_values=None, media=None, **kwargs):  # type: ignore[override]
        """As in transformers; images are encoded and projected once, before the first token.

        input_ids: int64[B, T], left-padded; pixel_values: float[N, 3, H, W] or media (`media()`).
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None:
            raise ValueError("input_ids is missing: a Flamingo finds its images by their tokens")
        with torch.no_grad():
            if media is None and pixel_values is not None and len(pixel_values):
                media = self.media(pixel_values=pixel_values)
        seen = self._seen(input_ids, media)
        kwargs.setdefault("eos_token_id", self._stop_tokens(kwargs.get("generation_config")))
        suppressed = list(kwargs.pop("suppress_tokens", None) or [])
        suppressed.append(self.config.image_token_id)
        return super().generate(  # type: ignore[misc]
            input_ids, media=media, seen=seen, suppress_tokens=suppressed, **kwargs
        )

    def _stop_tokens(self, generation_config) -> list[int]:
        eos = (generation_config or self.generation_config).eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return list(dict.fromkeys([*eos, self.config.end_of_chunk_token_id]))

    def prepare_inputs_for_generation(self, input_ids: Any, seen: Any = None, **kwargs):  # type: ignore[override]
        """New tokens see the image that the last prompt token saw (they cannot be <image>)."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        missing = input_ids.shape[1] - seen.shape[1]
        if missing:
            seen = torch.cat((seen, seen[:, -1:].expand(-1, missing)), dim=1)
        inputs["seen"] = seen[:, -inputs["input_ids"].shape[1] :]
        return inputs

    # -- where it looks ------------------------------------------------------------------

    @torch.no_grad()
    def attention_maps(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Where each token looks on the image that it sees: float32[B, T, G].

        The gated blocks' attention to the latents, weighted by how far each block's gate is
        open (|tanh|), composed with the resampler's attention of latents to grid places.
        Rows sum to 1, or are 0 where the token sees no image. The logits of a token are made at
        the position *before* it: look there for where the model looked when it chose a token.
        """
        if not len(pixel_values):
            self._seen(input_ids, None)
            return torch.zeros(*input_ids.shape, math.prod(self.config.vision_config.grid))  # type: ignore
        grids = self.encode_images(pixel_values)
        media = self.media(grids=grids)
        seen = self._seen(input_ids, media)
        conditioning = Conditioning(Runs.of(seen), media, record={})
        with self._decoder.conditioned(conditioning):
            self.language_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        assert conditioning.record is not None
        gates = torch.stack([b.attn_gate.float().tanh().abs() for b in self.gated_blocks])  # type: ignore
        if not gates.any():  # all shut, as before training: every block counts alike
            gates = torch.ones_like(gates)
        shares = (gates / gates.sum()).flatten()
        tokens = sum(shares[i] * w for i, w in conditioning.record.items())  # [B, T, L]
        places = self.resampler.attention_map(grids)[seen.clamp_min(0)]  # [B, T, L, G]
        maps = torch.einsum("btl,btlg->btg", tokens, places)
        return maps * (seen >= 0)[..., None]
