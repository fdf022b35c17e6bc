"""Conditions any frozen Hugging Face causal LM from outside.

The LM's classes, forward methods and weight names stay untouched: four kinds of hook let the
added tokens in, put a gated block before some layers, and keep logits to the positions asked
for. What the hooks need of one forward pass lies in one slot, set in a `with`.
B rows, T tokens, W LM width, V LM vocabulary, A added tokens, M kept positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flamingo.config import FlamingoConfig
from flamingo.cross_attention import GatedCrossAttentionBlock, Media
from flamingo.media import Runs
from flamingo.nll import head_nll


def find_decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """The LM's list of decoder layers, by structure: as long as `num_hidden_layers`.

    Raises ValueError when no list, or more than one, is of that length.
    """
    expected = language_model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    found = {
        name: module
        for name, module in language_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected
    }
    outer = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise ValueError(
            f"{type(language_model).__name__}: looked for one nn.ModuleList of "
            f"num_hidden_layers={expected} decoder layers, found {outer or 'none'}"
        )
    return found[outer[0]]  # type: ignore[return-value]


@torch.no_grad()
def residual_rms(language_model: nn.Module, rows: list[list[int]]) -> list[float]:
    """How large the residual stream is before each decoder layer: median over tokens of the root
    mean square of a token's hidden state, mean over `rows` of token ids.

    The first token is left out: it serves many LMs as a sink and is far larger than the others.
    """
    layers = find_decoder_layers(language_model)
    found: list[list[float]] = [[] for _ in layers]

    def hook(index: int):
        def measure(layer, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            found[index].append(hidden[0, 1:].float().pow(2).mean(dim=-1).sqrt().median().item())

        return measure

    handles = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for row in rows:
            language_model(torch.tensor([row], device=next(language_model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return [sum(values) / len(values) for values in found]


class AddedTokens(nn.Module):
    """Input and output rows of the added tokens: the LM's own tables stay frozen."""

    def __init__(self, count: int, input_width: int, output_width: int):
        super().__init__()
        self.input = nn.Parameter(torch.empty(count, input_width))
        self.output = nn.Parameter(torch.empty(count, output_width))

    def forward(self, x: Tensor) -> Tensor:
        """int64[M], numbers of added tokens -> their input rows, [M, W]; float[..., W] -> their
        logits, [..., A]. A call, so that whoever keeps weights in pieces knows when they are used."""
        if not x.is_floating_point():
            return self.input[x]
        return x.to(self.output.dtype) @ self.output.t()

    @torch.no_grad()
    def start_from(self, table: Tensor, output_table: Tensor, std: float) -> None:
        """Start at the mean row of the LM's tables, plus noise that tells the tokens apart."""
        for rows, source in ((self.input, table), (self.output, output_table)):
            rows.copy_(source.float().mean(dim=0) + torch.randn_like(rows, dtype=torch.float32) * std)


@dataclass
class Conditioning:
    """What the hooks of one forward pass read, and what they record."""

    runs: Runs | None
    media: Media | None
    keep: Tensor | None = None  # int64[M]: which of the B*T positions' logits are wanted (None: all)
    record: dict[int, Tensor] | None = None  # block -> attention weights, when asked for
    image_token: int = -1
    vectors: Tensor | None = None  # float[K, W]: what stands for the K <image> tokens, row by row
    targets: Tensor | None = None  # int64[M]: what kept positions predict, for `nll` in place of logits
    nll: Tensor | None = None  # float32[M], by the hooks
    log_sums: Tensor | None = None  # float32[M], log-sum-exp of the logits beside it
    kept: Tensor | None = None  # float[M', W]: what goes into the head for it


class Decoder:
    """Installs the hooks. Holds no parameters: those belong to the model that owns it."""

    def __init__(self, config: FlamingoConfig, model: nn.Module, positions: Sequence[int]):
        """model: what holds language_model, gated_blocks and added_tokens, by these names; positions:
        the LM layer that each block stands before."""
        self.first_added = config.first_added_token_id
        self.model: Any = model
        language_model = self.model.language_model
        self.slot: Conditioning | None = None
        layers = find_decoder_layers(language_model)
        for index, position in enumerate(positions):
            # A partial and no closure: a copy of the model copies it, with the decoder in it.
            hook = partial(self._block_hook, index)
            layers[position].register_forward_pre_hook(hook, with_kwargs=True)
        embeddings = language_model.get_input_embeddings()
        embeddings.register_forward_pre_hook(self._ids_hook)
        embeddings.register_forward_hook(self._embed_hook)
        head = language_model.get_output_embeddings()
        head.register_forward_pre_hook(self._keep_hook)
        head.register_forward_hook(self._logits_hook)
        self._ids: Tensor | None = None

    # Looked up when they are used: an adapter library may have put others in their places.
    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.gated_blocks

    @property
    def added(self) -> AddedTokens:
        return self.model.added_tokens

    @cached_property
    def hands_on_logits(self) -> bool:
        """Whether the LM gives the logits of its head as they are: some cap or scale them.

        Asked of its class, without weights; False where that cannot run without numbers.
        """
        given: list[Tensor] = []
        config = copy.deepcopy(self.model.config.get_text_config())  # `from_config` writes into it
        try:
            with torch.device("meta"), torch.no_grad():
                # The LM's own way to attend may look at numbers.
                language_model = AutoModelForCausalLM.from_config(
                    config, attn_implementation="eager", trust_remote_code=False
                )
                head = language_model.get_output_embeddings()
                head.register_forward_hook(lambda module, args, output: given.append(output))
                out = language_model(torch.zeros(1, 2, dtype=torch.int64))
        except Exception:  # whatever a family's code raises on tensors that are shapes only
            return False
        return any(out.logits is logits for logits in given)

    @contextmanager
    def conditioned(self, conditioning: Conditioning) -> Iterator[Conditioning]:
        """Within this `with`, calls of the LM see the images of `conditioning`."""
        previous, self.slot = self.slot, conditioning
        try:
            yield conditioning
        finally:
            self.slot = previous

    def _ids_hook(self, module, args):
        """Ids of added tokens are outside the LM's table: look up row 0, replaced below."""
        if self.slot is None:
            return None
        self._ids = args[0]
        return (args[0].masked_fill(args[0] >= self.first_added, 0), *args[1:])

    def _embed_hook(self, module, args, output):
        if self.slot is None or self._ids is None:
            return None
        ids, self._ids = self._ids, None
        is_added = ids >= self.first_added
        places = is_added.nonzero(as_tuple=True)
        # Some tables scale what they give (Gemma): an added row is treated like a word's.
        rows = self.added(ids[places] - self.first_added) * getattr(module, "embed_scale", 1.0)
        output = output.index_put(places, rows.to(output.dtype))
        if self.slot.vectors is None:
            return output
        places = (ids == self.slot.image_token).nonzero(as_tuple=True)
        return output.index_put(places, self.slot.vectors.to(output.dtype))

    def _block_hook(self, index: int, layer, args, kwargs):
        """Block `index` on what goes into a layer: float[B, T, W]."""
        slot = self.slot
        if slot is None or slot.runs is None:
            return None
        by_name = not args
        hidden = kwargs["hidden_states"] if by_name else args[0]
        block: GatedCrossAttentionBlock = self.blocks[index]  # type: ignore[assignment]
        # Without any image the feed-forward still runs: a row of text means the same alone
        # as in a batch whose other rows have images.
        keys = values = None
        if slot.media is not None:
            keys, values = slot.media.keys[index], slot.media.values[index]
        if slot.record is not None and keys is not None:
            slot.record[index] = block.attention_weights(hidden, keys, slot.runs)
        hidden = block(hidden, keys, values, slot.runs)
        if by_name:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    def _keep_hook(self, module, args):
        """float[B, T, W] -> float[1, M, W]: no logits that nobody reads; none at all where the NLL of
        targets is asked for."""
        slot = self.slot
        if slot is None or slot.keep is None:
            return None
        kept = rearrange(args[0], "b t w -> (b t) w").index_select(0, slot.keep)
        if slot.targets is not None:
            slot.kept, kept = kept, kept[:0]
        return (kept[None], *args[1:])

    def _logits_hook(self, module, args, output):
        """[..., V] -> [..., first_added + A]; a padded table's unused rows fall away."""
        slot = self.slot
        if slot is None:
            return None
        if slot.kept is not None and slot.targets is not None:  # here a head in pieces is whole
            added = self.added(slot.kept)
            bias = None if module.bias is None else module.bias[: self.first_added]
            weight = module.weight[: self.first_added]
            slot.nll, slot.log_sums = head_nll(weight, bias, slot.kept, added, slot.targets)
            slot.kept = None
            return None
        extra = self.added(args[0])
        return torch.cat((output[..., : self.first_added], extra.to(output.dtype)), dim=-1)
