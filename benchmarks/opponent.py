"""OpenFlamingo 2.0.1 as an opponent: its own modules, its own padding, its own training loop.

What runs is `open_flamingo.train.train_utils.train_one_epoch` on batches of
`open_flamingo.train.data`'s preprocessing. What had to be given from outside, because its pins are
of 2023, is below and nothing else:

- `wandb` is imported by its loop and never used here: an empty module stands for it if it is absent;
- its autocast is CUDA's by name; without a GPU the CPU's is used, in the same dtype;
- DDP is a wrapper that only holds `.module`, for one process;
- the encoder is this repository's instead of open_clip's, through a class that gives what its
  `_encode_vision_x` takes, and stays in eval mode as a ViT without batch norm would;
- its data set drops half of the documents with one image at random; here none is dropped.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.mixture import Sample, Step
from flamingo.attention import attend_plainly

CAPTION_TOKENS, DOCUMENT_TOKENS, DOCUMENT_IMAGES = 32, 256, 6
SIMILAR = 100.0  # above any --mmc4_textsim_threshold


class Encoder(nn.Module):
    """pixels -> (pooled, grid), as an open_clip tower with `output_tokens`."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> tuple[None, Tensor]:
        return None, self.encoder(pixels.to(next(self.encoder.parameters()).dtype))

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)


class OneProcess(nn.Module):
    """Stands for DDP; notes the labels that the LM is asked for."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.targets: list[Tensor] = []
        self.tokens = 0
        self.losses: list[float] = []

    def forward(self, **inputs: Any) -> Any:
        labels = inputs["labels"][:, 1:]
        self.targets.append(labels[labels != -100])
        self.tokens += inputs["lang_x"].numel()
        out = self.module(**inputs)
        self.losses.append(out[0].item())
        return out


def load(
    language: str,
    encoder: nn.Module,
    width: int,
    tokenizer: Any,
    every: int,
    depth: int,
    tuned: bool,
    precision: str = "amp_bf16",
) -> nn.Module:
    """Its Flamingo on a frozen LM, as its `create_model_and_transforms` makes one.

    tuned: with this repository's way to keep and run frozen parts on a CPU: bfloat16, plain attention.
    """
    from open_flamingo.src.factory import _infer_decoder_layers_attr_name
    from open_flamingo.src.flamingo import Flamingo
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.helpers import PerceiverResampler
    from open_flamingo.src.utils import extend_instance
    from transformers import AutoModelForCausalLM

    # transformers of its time attended by plain products, and loaded in float32.
    lm: Any = AutoModelForCausalLM.from_pretrained(
        language, dtype=torch.float32, attn_implementation="sdpa" if tuned else "eager"
    )
    layers = _infer_decoder_layers_attr_name(lm)
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name(layers)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tuned and precision != "fp32":
        lm.to(torch.bfloat16)
        lm.get_input_embeddings().to(torch.float32)
        encoder.to(torch.bfloat16)
    if tuned:
        attend_plainly(lm)
    ids = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    tower = types.SimpleNamespace(visual=Encoder(encoder))
    model: Any = Flamingo(tower, lm, *ids, vis_dim=width, cross_attn_every_n_layers=every)  # type: ignore[arg-type]
    model.perceiver = PerceiverResampler(dim=width, depth=depth)  # its constructor always makes 6 layers
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(True)
    return model


class Opponent:
    """One side of the benchmark."""

    def __init__(self, model: nn.Module, tokenizer: Any, transform: Callable, precision: str, weights: tuple):
        self.model, self.tokenizer, self.transform = OneProcess(model), tokenizer, transform
        self.train_utils, self.data = _its_modules()
        device = next(model.parameters()).device
        self.device = device
        autocast = partial(torch.autocast, device.type, torch.bfloat16)
        self.train_utils.get_autocast = lambda name, cache_enabled=True: (
            partial(autocast, cache_enabled=cache_enabled) if name == "amp_bf16" else _no_autocast
        )
        self.args = types.SimpleNamespace(
            num_epochs=1,
            rank=1,  # rank 0 also draws a progress bar
            precision=precision,
            fsdp=False,
            gradient_accumulation_steps=1,
            loss_multiplier_laion=weights[0],
            loss_multiplier_mmc4=weights[1],
            freeze_lm_embeddings=False,
            logging_steps=100,
        )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        decayed = [p for name, p in named if "gated_cross_attn" in name]
        plain = [p for name, p in named if "gated_cross_attn" not in name]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)

    def prepare(self, step: Step) -> tuple[Any, Any]:
        """The step as its loader gives it: (batch_laion, batch_mmc4)."""
        pictures = [self._open(sample.pictures[0]) for sample in step.captions]
        images = self.data.preprocess_image(pictures, self.transform)
        text = self.data.preprocess_laion_text(
            [sample.texts[0] for sample in step.captions], self.tokenizer, CAPTION_TOKENS
        )
        documents = [
            self.data.preprocess_interleaved(
                (json.dumps(_mmc4(sample)),), self.tokenizer, self.transform, 0.3, 1, DOCUMENT_IMAGES
            )
            for sample in step.documents
        ]
        return (images, text), (torch.stack([d[0] for d in documents]), [d[1] for d in documents])

    def train(self, batch: tuple[Any, Any]) -> dict[str, Any]:
        """One step of its `train_one_epoch`."""
        self.model.targets, self.model.losses, self.model.tokens = [], [], 0
        self.train_utils.train_one_epoch(
            args=self.args,
            model=self.model,
            epoch=0,
            laion_loader=_Loader([batch[0]]),
            mmc4_loader=_Loader([batch[1]]),
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            device_id=self.device,
            wandb=None,
        )
        return {
            "losses": self.model.losses,
            "tokens": self.model.tokens,
            "images": len(batch[0][0]) + batch[1][0].shape[0] * batch[1][0].shape[1],
            "targets": torch.cat(self.model.targets),
        }

    def _open(self, data: bytes) -> Any:
        import io

        import PIL.Image

        return PIL.Image.open(io.BytesIO(data)).convert("RGB")


class _Loader(list):
    @property
    def num_batches(self) -> int:
        return len(self)


def _no_autocast() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _mmc4(sample: Sample) -> dict[str, Any]:
    """A sample as a line of MMC4: sentence i belongs to image i."""
    count = len(sample.texts)
    return {
        "text_list": list(sample.texts),
        "similarity_matrix": [[SIMILAR * (row == i) for row in range(count)] for i in range(count)],
        "image_info": [{"image_base64": base64.b64encode(data).decode()} for data in sample.pictures],
    }


def _its_modules() -> tuple[Any, Any]:
    """open_flamingo.train's train_utils and data, which import each other as top-level modules."""
    if importlib.util.find_spec("wandb") is None:
        sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    root = importlib.util.find_spec("open_flamingo")
    assert root is not None and root.submodule_search_locations
    folder = str(Path(root.submodule_search_locations[0]) / "train")
    sys.path.insert(0, folder)
    try:
        data = importlib.import_module("open_flamingo.train.data")
    finally:
        sys.path.remove(folder)
    data.random = types.SimpleNamespace(random=lambda: 1.0)  # type: ignore[attr-defined]
    return importlib.import_module("open_flamingo.train.train_utils"), data


def its_tokenizer(language: str) -> Any:
    """The LM's tokenizer with the added tokens, in OpenFlamingo's order."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(language)
    added = ["<|endofchunk|>", "<image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    # transformers 5 keeps these under other names.
    tokenizer.additional_special_tokens = added
    tokenizer.additional_special_tokens_ids = tokenizer.convert_tokens_to_ids(added)
    return tokenizer


def missing() -> list[str]:
    """What is missing to run the opponent."""
    return [name for name in ("open_flamingo", "einops_exts") if importlib.util.find_spec(name) is None]
