"""Pictures and questions -> vectors of length 1, each computed once and kept by its content.

N items, D width of a vector, G grid places.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from flamingo.data.transforms import decode_image
from flamingo.data.writing import write_aside
from flamingo.runtime import cores

Part = Literal["image", "text"]
Item = Path | str  # a picture's file, or a text
PARTS: dict[str, tuple[Part, ...]] = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
BATCH = 32  # items that an encoder takes at a time
CHUNK = 256  # items of a file: what a killed process loses
SETTLED = 2.0  # seconds after which a file that is written again has another time
CHOICES = "open_clip:ARCHITECTURE/WEIGHTS, e.g. open_clip:ViT-B-32/openai, or model:FOLDER"


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

    @torch.inference_mode()
    def embed(self, part: Part, items: Sequence[Item]) -> np.ndarray:
        """float32[N, D], each of length 1. Raises ValueError for a picture that cannot be read, or an
        item without a direction."""
        found = []
        with ThreadPoolExecutor(min(8, cores())) as threads:
            for start in range(0, len(items), BATCH):
                batch = items[start : start + BATCH]
                if part == "image":
                    features = self.pictures(list(threads.map(_picture, batch)))
                else:
                    features = self.texts([str(text) for text in batch])
                found.append(_of_length_one(features, batch, self.name))
        return np.concatenate(found)


def _picture(path: Item) -> Any:
    try:
        return decode_image(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"picture {path} cannot be read: {error}") from None


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
        """name: ARCHITECTURE/WEIGHTS, weights being a tag or a file; hf-hub:OWNER/NAME; local-dir:FOLDER.

        Raises ValueError for what open_clip does not have, or weights that cannot be read.
        """
        import open_clip

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
        except (RuntimeError, OSError, ValueError, UnpicklingError) as error:
            raise ValueError(f"encoder {self.name}: no weights could be read: {error}") from error
        self.model, self.prepare = made[0].eval(), made[1]
        prepared = open_clip.get_model_preprocess_cfg(self.model)
        self.settings = json.dumps([prepared, quick], sort_keys=True, default=str)

    def pictures(self, images: list[Any]) -> Tensor:
        return self.model.encode_image(torch.stack([self.prepare(image) for image in images]).to(_device()))

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
            f"names them all); write {CHOICES}"
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


def text_key(text: str) -> str:
    """A text's name in a store of vectors."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def picture_keys(folder: Path, pictures: Iterable[Path]) -> dict[Path, str]:
    """Digests of the content of pictures, 32 hex digits. Kept in the folder with size and time of each
    file, so that one that has not changed is read once, by one process."""
    memo = folder / "pictures.json"
    found: dict[Path, str] = {}
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / "pictures.lock"):
        known = _memo(memo)
        new = []
        for picture in dict.fromkeys(pictures):
            size, changed, key = known.get(str(picture.absolute()), (0, 0, ""))
            stat = picture.stat()
            if key and (size, changed) == (stat.st_size, stat.st_mtime_ns):
                found[picture] = key
            else:
                new.append((picture, stat.st_size, stat.st_mtime_ns))
        with ThreadPoolExecutor(min(8, cores())) as threads:
            keys = list(threads.map(_content_key, [picture for picture, _, _ in new]))
        for (picture, size, changed), key in zip(new, keys, strict=True):
            found[picture] = key
            if time.time() - changed / 1e9 > SETTLED:
                known[str(picture.absolute())] = (size, changed, key)
        if new:
            write_aside(memo, lambda place: place.write_text(json.dumps(known)))
    return found


def _content_key(picture: Path) -> str:
    return hashlib.sha256(picture.read_bytes()).hexdigest()[:32]


def _memo(file: Path) -> dict[str, tuple[int, int, str]]:
    """Nothing where it cannot be read: all it saves is time."""
    try:
        return {
            path: (int(size), int(at), str(key))
            for path, (size, at, key) in json.loads(file.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class Vectors:
    """A folder of vectors by encoder and content, in safetensors files that are whole or absent.

    Several processes that want the same share the work: each file is computed by one of them.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1):
        self.folder, self.rank, self.world = folder, rank, world
        self._seen: set[Path] = set()  # a file never changes
        self._places: dict[str, dict[str, tuple[Path, int]]] = {}

    def get(
        self, encoder: Encoder, part: Part, items: Mapping[str, Item], keep: Collection[str] | None = None
    ) -> np.ndarray:
        """float32[N, D] of the items `keep`, by key, in that order; None: all.

        Every process must ask for the same items, in the same order: then the encoder's batches are
        the same however many processes there are.
        """
        stem = f"{part}-{encoder.digest(part)}"
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        known = self._known(stem)
        keys = list(items)
        chunks = [keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK)]
        left = [chunk for chunk in chunks if any(key not in known for key in chunk)]
        first = self.rank * len(left) // self.world
        left = left[first:] + left[:first]  # processes begin at different places
        quiet = self.rank > 0 or not sys.stderr.isatty() or not left
        with tqdm(total=len(left) * CHUNK, desc=f"{part} vectors", unit="", disable=quiet) as bar:
            for wait in (False, True):
                left = [c for c in left if not self._make(encoder, part, stem, c, items, wait, bar)]
        return self._gather(stem, keys if keep is None else list(keep))

    def _make(
        self,
        encoder: Encoder,
        part: Part,
        stem: str,
        chunk: list[str],
        items: Mapping[str, Item],
        wait: bool,
        bar: tqdm,
    ) -> bool:
        """Whether the chunk is there now; not where another process is at it and this one does not wait."""
        lock = FileLock(self.folder / "locks" / f"{stem}-{_name(chunk)}.lock")
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            return False
        try:
            known = self._known(stem)
            new = [key for key in chunk if key not in known]
            if new:
                vectors = encoder.embed(part, [items[key] for key in new])
                file = self.folder / f"{stem}-{_name(new)}.safetensors"
                content = {"keys": "\n".join(new)}
                write_aside(file, lambda place: save_file({"vectors": vectors}, place, content))
            bar.update(CHUNK)
            return True
        finally:
            lock.release()

    def _known(self, stem: str) -> dict[str, tuple[Path, int]]:
        """Where the vector of each key lies: file and row."""
        found = self._places.setdefault(stem, {})
        for file in set(self.folder.glob(f"{stem}-*.safetensors")) - self._seen:
            with _opened(file) as content:
                keys = (content.metadata() or {}).get("keys", "").split("\n")
            found.update((key, (file, row)) for row, key in enumerate(keys))
            self._seen.add(file)
        return found

    def _gather(self, stem: str, keys: list[str]) -> np.ndarray:
        known = self._known(stem)
        places: dict[Path, list[tuple[int, int]]] = {}
        for number, key in enumerate(keys):
            file, row = known[key]
            places.setdefault(file, []).append((number, row))
        out = np.empty((0, 0), np.float32)
        for file, rows in places.items():
            with _opened(file) as content:
                vectors = content.get_tensor("vectors")
            if not out.size:
                out = np.empty((len(keys), vectors.shape[1]), np.float32)
            numbers, at = (list(column) for column in zip(*rows, strict=True))
            out[numbers] = vectors[at]
        return out


def _name(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete it, and its vectors are computed anew"
        ) from None
