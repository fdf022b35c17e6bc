"""Pictures and texts -> vectors of length 1, by an encoder.

N items, D width of a vector, G grid places.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from flamingo.data.transforms import decode_image
from flamingo.runtime import cores

Part = Literal["image", "text"]
PARTS: dict[str, tuple[Part, ...]] = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
BATCH = 32  # items that an encoder takes at a time
# Of weights or a config that are damaged, or of something else.
UNREADABLE = (RuntimeError, OSError, ValueError, KeyError, TypeError, UnpicklingError, SafetensorError)
CONFIG = "open_clip_config.json"  # of a folder that open_clip loads
CHOICES = (
    "open_clip:ARCHITECTURE/WEIGHTS, e.g. open_clip:ViT-B-32/openai; open_clip:FOLDER, one that holds "
    f"{CONFIG}; or model:FOLDER"
)


class Picture(Protocol):
    """A picture that is no file of its own. `str` of it says where it lies."""

    def decode(self) -> Any:
        """RGB (PIL). Raises ValueError or OSError for one that cannot be read."""
        ...


Item = Path | str | Picture  # a picture's file, or a text, or a picture elsewhere


class Encoder(ABC):
    """What makes vectors. `name` is what `load` makes it of again."""

    name: str

    @abstractmethod
    def pictures(self, images: list[Any]) -> Tensor:
        """RGB pictures (PIL) -> float[N, D], of any length."""

    @abstractmethod
    def texts(self, texts: list[str]) -> Tensor:
        """Texts -> float[N, D], of any length."""

    @abstractmethod
    def identity(self, part: Part) -> tuple[str, dict[str, Tensor]]:
        """All that a part's vectors depend on: how items are prepared, and weights."""

    def logits(self) -> tuple[float, float | None] | None:
        """What cosines of pictures with texts are multiplied with, and what is added to them (SigLIP;
        None: nothing); None: they have no space in common, so their cosines say nothing."""
        return None

    def digest(self, part: Part) -> str:
        """Tells this encoder's pictures or texts from any other's: 16 hex digits."""
        known: dict[Part, str] = vars(self).setdefault("_digests", {})
        if part not in known:
            known[part] = self._digest(part)
        return known[part]

    def _digest(self, part: Part) -> str:
        prepared, weights = self.identity(part)
        digest = hashlib.sha256(prepared.encode())
        for name, tensor in sorted(weights.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def embed(self, part: Part, items: Sequence[Item]) -> np.ndarray:
        """float32[N, D], each of length 1. Raises ValueError for a picture that cannot be read, or an
        item without a direction."""
        return self._embed(part, items, None)

    def embed_readable(self, part: Part, items: Sequence[Item]) -> tuple[np.ndarray, dict[int, str]]:
        """As `embed`, of what can be read; and why the others cannot, by their place in the items."""
        faults: dict[int, str] = {}
        return self._embed(part, items, faults), faults

    @torch.inference_mode()
    def _embed(self, part: Part, items: Sequence[Item], faults: dict[int, str] | None) -> np.ndarray:
        found = []
        with ThreadPoolExecutor(min(8, cores())) as threads:
            for start in range(0, len(items), BATCH):
                batch = items[start : start + BATCH]
                if part == "text":
                    features = self.texts([str(text) for text in batch])
                else:
                    images = list(threads.map(_opened, batch))
                    for number, image in enumerate(images):
                        if isinstance(image, Exception):
                            if faults is None:
                                raise ValueError(f"picture {batch[number]} cannot be read: {image}")
                            faults[start + number] = str(image)
                    good = [n for n, image in enumerate(images) if not isinstance(image, Exception)]
                    if not good:
                        continue
                    batch = [batch[n] for n in good]
                    features = self.pictures([images[n] for n in good])
                found.append(_of_length_one(features, batch, self.name))
        return np.concatenate(found) if found else np.empty((0, 0), np.float32)


def _opened(item: Item) -> Any:
    """The picture, or the exception that says why it cannot be read."""
    try:
        return decode_image(Path(item).read_bytes()) if isinstance(item, (Path, str)) else item.decode()
    except (OSError, ValueError) as error:
        return error


def _of_length_one(features: Tensor, items: Sequence[Item], name: str) -> np.ndarray:
    vectors = features.double().cpu().numpy()
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    for item, length in zip(items, lengths[:, 0], strict=True):
        if not np.isfinite(length) or not length:
            raise ValueError(
                f"{name} makes a vector of length {length} of {str(item)!r}: use another encoder"
            )
    return (vectors / lengths).astype(np.float32)


class OpenClip(Encoder):
    """Any model of open_clip, by its own API: both towers, and its own way of preparing pictures."""

    def __init__(self, name: str):
        """name: ARCHITECTURE/WEIGHTS, weights being a tag or a file; a folder that holds `CONFIG`;
        hf-hub:OWNER/NAME; local-dir:FOLDER.

        Raises ValueError for what open_clip does not have, or weights that cannot be read.
        """
        import open_clip

        folder = Path(name).expanduser()
        if (folder / CONFIG).is_file():
            name = f"local-dir:{folder.resolve()}"
        self.name = f"open_clip:{name}"
        inside = name.startswith(("hf-hub:", "local-dir:"))
        architecture, tag = (name, "") if inside else name.partition("/")[::2]
        quick = not inside and _known(self.name, architecture, tag).get("quick_gelu", False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of QuickGELU, which is seen to here
                made: Any = open_clip.create_model_from_pretrained(
                    architecture, tag or None, force_quick_gelu=quick, device=_device()
                )
            self.tokenizer: Any = open_clip.get_tokenizer(architecture)
        except UNREADABLE as error:
            raise ValueError(f"encoder {self.name}: no weights could be read: {error}") from error
        self.model, self.prepare = made[0].eval(), made[1]
        prepared = open_clip.get_model_preprocess_cfg(self.model)
        self.settings = json.dumps([prepared, quick], sort_keys=True, default=str)

    def logits(self) -> tuple[float, float | None]:
        bias = getattr(self.model, "logit_bias", None)
        return self.model.logit_scale.exp().item(), None if bias is None else bias.item()

    def pictures(self, images: list[Any]) -> Tensor:
        with ThreadPoolExecutor(min(8, cores())) as threads:
            prepared = list(threads.map(self.prepare, images))
        return self.model.encode_image(torch.stack(prepared).to(_device()))

    def texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(_device()))

    def identity(self, part: Part) -> tuple[str, dict[str, Tensor]]:
        state = self.model.state_dict()
        seeing = {name for name in state if name.startswith("visual.")}
        scale = {"logit_scale", "logit_bias"}
        wanted = seeing if part == "image" else state.keys() - seeing - scale
        prepared = self.settings if part == "image" else type(self.tokenizer).__name__
        return prepared, {name: state[name] for name in wanted}


def _known(name: str, architecture: str, tag: str) -> dict:
    """What open_clip knows of these weights; nothing of a file."""
    import open_clip

    if open_clip.get_model_config(architecture) is None:
        raise ValueError(
            f"encoder {name}: open_clip has no architecture {architecture!r} (open_clip.list_models() "
            f"names them all), nor is this a folder with {CONFIG}; write {CHOICES}"
        )
    known = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if not known and not (tag and Path(tag).is_file()):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ValueError(
            f"encoder {name}: {tag!r} is neither a file nor weights that open_clip knows of "
            f"{architecture} ({tags}); write {CHOICES}"
        )
    return known


class Own(Encoder):
    """A Flamingo's own frozen parts: the mean of the encoder's grid; the mean of the language model's
    input embeddings. Training changes neither, so one index serves all checkpoints of a run."""

    def __init__(self, name: str, model: Any, processor: Any):
        self.name, self.model, self.processor = name, model, processor

    @classmethod
    def load(cls, folder: str) -> Own:
        """Raises ValueError for a folder without a model."""
        from flamingo.modeling import FlamingoForConditionalGeneration
        from flamingo.processing import FlamingoProcessor

        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"encoder model:{folder}: the folder holds no model (no config.json)")
        model = FlamingoForConditionalGeneration.from_pretrained(folder).eval()
        model.to(_device())  # type: ignore[arg-type]
        return cls(f"model:{Path(folder).resolve()}", model, FlamingoProcessor.from_pretrained(folder))

    def pictures(self, images: list[Any]) -> Tensor:
        transform = self.processor.image_processor.transform
        pixels = torch.stack([transform(image) for image in images]).to(self.model.device)
        return self.model.encode_images(pixels).float().mean(1)

    def texts(self, texts: list[str]) -> Tensor:
        table = self.model.get_input_embeddings().weight
        added = self.model.config.first_added_token_id  # their rows lie elsewhere, and are learned
        rows = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        means = []
        for row in rows:
            ids = torch.tensor([i for i in row if i < added], dtype=torch.long, device=table.device)
            means.append(table[ids].float().mean(0))
        return torch.stack(means)

    def identity(self, part: Part) -> tuple[str, dict[str, Tensor]]:
        if part == "image":
            return repr(self.processor.image_processor.transform), self.model.vision_encoder.state_dict()
        words = json.dumps(sorted(self.processor.tokenizer.get_vocab().items(), key=lambda item: item[1]))
        return words, {"table": self.model.get_input_embeddings().weight}


def load(name: str) -> Encoder:
    """An encoder by name. Raises ValueError, naming the choices."""
    kind, _, rest = name.partition(":")
    if kind == "open_clip" and rest:
        return OpenClip(rest)
    if kind == "model" and rest:
        return Own.load(rest)
    raise ValueError(f"encoder={name!r}: write {CHOICES}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
