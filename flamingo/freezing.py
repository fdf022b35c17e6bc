"""What of a Flamingo is trained and what is frozen, and recomputing instead of keeping."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo.decoder import find_decoder_layers

ALWAYS = ("resampler", "gated_blocks", "added_tokens")
ON_REQUEST = ("language_model", "vision_encoder", "embeddings")


class FrozenParts:
    """The encoder and the LM are frozen until `unfreeze` says otherwise. For a PreTrainedModel."""

    supports_gradient_checkpointing = True
    _unfrozen: frozenset[str] = frozenset()

    def freeze(self) -> None:
        """No gradient for the encoder and the LM, whatever was unfrozen before."""
        model: Any = self
        self._unfrozen = frozenset()
        model.vision_encoder.requires_grad_(False)
        model.language_model.requires_grad_(False)
        self.train(model.training)

    def unfreeze(self, *parts: str) -> None:
        """Train these as well: "language_model", "vision_encoder", or "embeddings", the LM's input
        and output tables. In the precision that they have: mostly to be raised before, `.float()`.

        Holds until `freeze`; `from_pretrained` gives a frozen model. Raises ValueError for other names.
        """
        model: Any = self
        unknown = [part for part in parts if part not in ON_REQUEST]
        if unknown or not parts:
            raise ValueError(f"unfreeze{parts}: choose from {', '.join(ON_REQUEST)}")
        self._unfrozen |= set(parts)
        for name, module in self.trained_modules().items():
            if name not in ALWAYS:
                module.requires_grad_(True)
        self.train(model.training)

    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules that training changes, by name; everything else stays as it is."""
        model: Any = self
        names = [*ALWAYS, *(part for part in ON_REQUEST[:2] if part in self._unfrozen)]
        modules = {name: getattr(model, name) for name in names}
        if "embeddings" in self._unfrozen and "language_model" not in self._unfrozen:
            modules["input_embeddings"] = model.get_input_embeddings()
            head = model.get_output_embeddings()
            if head.weight is not modules["input_embeddings"].weight:
                modules["output_embeddings"] = head
        return modules

    @property
    def skips_logits(self) -> bool:
        """Whether `skip_logits` of the forward pass saves something: a frozen head of plain rows, whose
        logits the LM gives as they are."""
        model: Any = self
        head = model.get_output_embeddings()
        trained = any(weight.requires_grad for weight in head.parameters())
        plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
        return plain and not trained and model._decoder.hands_on_logits

    def train(self, mode: bool = True):
        """Frozen means frozen: the encoder and the LM stay in eval mode (no dropout), but for the
        dropout of adapters in the LM (PEFT's LoRA). Statistics of an encoder's BatchNorm stay what they are
        also where it is trained: they would be each rank's own, and follow the size of its batch."""
        model: Any = self
        super().train(mode)  # type: ignore[misc]
        for part in (model.vision_encoder, model.language_model):
            part.eval()
        for module in self.trained_modules().values():
            module.train(mode)
        for module in model.vision_encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False  # and not of what it holds
        for name, module in model.language_model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        for layer in find_decoder_layers(model.language_model):
            if _recomputes(layer):  # transformers recomputes layers in training mode only
                layer.training = mode
        return self

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs
    ) -> None:
        """Recompute LM layers and gated blocks in the backward pass, also while the LM is frozen.

        The gated blocks run before a layer and outside of its recomputation, with their own.
        """
        model: Any = self
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)  # type: ignore[misc]
        for layer in find_decoder_layers(model.language_model):
            if _recomputes(layer):
                layer._gradient_checkpointing_func = partial(_recompute, layer, gradient_checkpointing_func)  # type: ignore[assignment]
        self.train(model.training)


def _recomputes(layer: nn.Module) -> bool:
    return isinstance(layer, GradientCheckpointingLayer) and bool(layer.gradient_checkpointing)


def _recompute(layer: nn.Module, checkpointed, function, *args):
    """`function` of a layer, now and in the backward pass, in the mode of the layer's parts: in
    training mode a frozen layer would drop out what its own forward drops (OPT)."""

    def forward(*args):
        mode, layer.training = layer.training, any(part.training for part in layer.children())
        try:
            return function(*args)
        finally:
            layer.training = mode

    return checkpointed(forward, *args)


def grad_if(wanted: bool):
    """Gradients where they are on and wanted."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and wanted)
