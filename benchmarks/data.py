"""The data room in figures: order, state, reading, pictures, packing. Opponents run in turn with us.

    python -m benchmarks.data [order] [state] [reading] [pictures] [packing]

Everything is made in a temporary folder. Prints one line of JSON per part; ratios are ours to
theirs in samples per second, the median of alternating rounds.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flamingo.data.batch import Collator
from flamingo.data.config import Augment, SourceConfig
from flamingo.data.packing import packed
from flamingo.data.shards import ShardSet
from flamingo.data.steps import StepDataset, open_feeds, step_loader
from flamingo.data.stream import Order, Stream
from flamingo.data.transforms import ImageTransform
from flamingo.data.writing import write_tars

HALF = (0.5, 0.5, 0.5)


def jpeg(side: int, seed: int, quality: int = 90) -> bytes:
    """A picture with structure at all scales, as photographs have."""
    random = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for size in (4, 16, 64, 256):
        noise = random.normal(size=(size, size, 3)) * side / size
        layer = [PIL.Image.fromarray(noise[..., c].astype(np.float32)).resize((side, side)) for c in range(3)]
        total += np.stack([np.asarray(x) for x in layer], -1)
    total = (total - total.min()) / np.ptp(total) * 255
    file = io.BytesIO()
    PIL.Image.fromarray(total.astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; ids 1 and 2 are <image> and <eoc>."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<image>", "<eoc>", "word"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="word"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", additional_special_tokens=["<image>", "<eoc>"]
    )


def write_pairs(folder: Path, count: int, per_shard: int, picture: Callable[[int], bytes]) -> str:
    samples = ((f"{n:06d}", {"jpg": picture(n), "txt": f"word {n}".encode()}) for n in range(count))
    folder.mkdir()
    write_tars(folder, "pairs", samples, per_shard)
    return str(folder / "*.tar")


def write_documents(folder: Path, count: int, per_shard: int) -> str:
    """Four pictures, each followed by words: more than fits into a row of 8 tokens."""
    items = [item for i in range(4) for item in ({"image": f"{i}.jpg"}, {"text": "word word"})]
    text = json.dumps({"items": items}).encode()
    samples = (
        (f"{n:06d}", {"json": text, **{f"{i}.jpg": jpeg(16, 4 * n + i) for i in range(4)}})
        for n in range(count)
    )
    folder.mkdir()
    write_tars(folder, "documents", samples, per_shard)
    return str(folder / "*.tar")


# -- order ---------------------------------------------------------------------------------


def _digests(feeds, steps: range, ranks: int, parts: int, workers: int) -> list[str]:
    """What all ranks together train on, per step: every tensor and key, byte for byte."""
    import hashlib

    loaders: list[Iterator] = [
        step_loader(StepDataset(feeds, rank, ranks, parts), steps.start, steps.stop, workers)
        for rank in range(ranks)
    ]
    found = []
    for by_rank in zip(*loaders, strict=True):
        digest = hashlib.sha256()
        for feed in feeds:
            for batch in (batch for batches in by_rank for batch in batches[feed.name]):
                ahead = [False] * len(batch.keys) if batch.look_ahead is None else batch.look_ahead.tolist()
                lengths = batch.attention_mask.sum(1).tolist()
                pictures = iter(batch.pixel_values)
                for row, length in enumerate(lengths):
                    digest.update(repr((batch.keys[row], ahead[row])).encode())
                    digest.update(batch.input_ids[row, :length].numpy().tobytes())
                    digest.update(batch.labels[row, :length].numpy().tobytes())
                    for _ in range(int((batch.input_ids[row, :length] == 1).sum())):
                        digest.update(next(pictures).numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def order(folder: Path) -> dict:
    """Ranks x workers x micro-batches x cut points: pairs, and documents that are cropped,
    augmented and see the next image half of the time."""
    augment = Augment(crop_scale=(0.3, 1.0), flip=0.5)
    fields = {"window": 3, "batch": 48, "max_tokens": 8}
    sources = [
        SourceConfig(
            name="a",
            kind="pairs",
            shards=write_pairs(folder / "order", 150, 20, lambda n: jpeg(16, n)),
            **fields,
        ),
        SourceConfig(
            name="b",
            kind="interleaved",
            shards=write_documents(folder / "documents", 200, 30),
            crop="random",
            augment=augment,
            p_next=0.5,
            weight=0.3,
            **fields,
        ),
    ]
    feeds = open_feeds(
        sources,
        seed=3,
        tokenizer=word_tokenizer(),
        transform=ImageTransform(8, HALF, HALF),
        image_token_id=1,
        end_of_chunk_id=2,
    )
    steps = 7  # more than an epoch of both
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    expected = _digests(feeds, range(steps), 1, 1, 0)
    cases = list(itertools.product((1, 2, 3, 4, 6), (0, 1, 3), (1, 2, 4), (0, 1, 3, 5, 6)))
    same = sum(
        _digests(feeds, range(cut, steps), ranks, parts, workers) == expected[cut:]
        for ranks, workers, parts, cut in cases
    )
    return {"combinations": len(cases), "identical": same}


# -- state ---------------------------------------------------------------------------------


def state(folder: Path) -> dict:
    """Bytes of what a run must remember of the data, time of a far seek, growth of memory."""
    random = np.random.default_rng(0)
    counts = random.integers(5_000, 15_000, size=10_000)  # 100 million samples in 10,000 shards
    far = Order(counts, 16, 1, "synthetic")
    far.locate(0)
    began = time.perf_counter()
    far.locate(1_000_000_000)
    seek = time.perf_counter() - began
    shards = write_pairs(folder / "state", 2_000, 100, lambda n: b"x" * 500)
    stream = Stream(SourceConfig(name="s", kind="benchmarks.data", shards=shards, batch=1, max_tokens=4), 1)

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for position in range(4_000):
        stream[position]
    before = memory()
    for position in range(4_000, 104_000):
        stream[position]
    return {
        "state_bytes": len(json.dumps({"step": 10**9})),
        "seek_ms": round(seek * 1e3, 2),
        "memory_growth": round(memory() / before - 1, 4),
    }


def read(sample, key):
    """A kind that decodes nothing: this module is one, for the measurement of memory."""
    from flamingo.data.document import Document, Text

    return Document((Text(sample["txt"].decode()),), key)


# -- speed ---------------------------------------------------------------------------------


def compare(ours: Callable[[], int], theirs: Callable[[], int], rounds: int = 5) -> dict:
    """Samples per second of both, in turn; each call returns how many samples it did."""
    ratios, speeds = [], []
    for _ in range(rounds):
        pair = []
        for run in (ours, theirs):
            began = time.perf_counter()
            pair.append(run() / (time.perf_counter() - began))
        ratios.append(pair[0] / pair[1])
        speeds.append(pair)
    return {
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "samples_per_second": [round(statistics.median(s[i] for s in speeds)) for i in range(2)],
    }


def reading(folder: Path) -> dict:
    """Members of samples in shuffled order, against webdataset's stream with its shuffle buffer."""
    import webdataset as wds

    shards = write_pairs(folder / "reading", 20_000, 1_000, lambda n: bytes(4_000))
    files = sorted(str(path) for path in (folder / "reading").glob("*.tar"))
    opened = ShardSet(shards)
    where = Order(opened.counts, 16, 1)

    def ours() -> int:
        for position in range(where.samples):
            place = where.locate(position)
            opened.read(place.shard, place.sample)
        return where.samples

    def theirs() -> int:
        stream = wds.WebDataset(files, shardshuffle=20, seed=1).shuffle(1000)  # type: ignore[attr-defined]
        return sum(1 for _ in stream)

    return compare(ours, theirs)


def pictures(folder: Path) -> dict:
    """1024-px JPEGs -> 224-px tensors: webdataset, Pillow and torchvision as open_clip sets them up."""
    import open_clip
    import webdataset as wds

    torch.set_num_threads(1)
    made = [jpeg(1024, n) for n in range(8)]
    shards = write_pairs(folder / "pictures", 200, 50, lambda n: made[n % 8])
    files = sorted(str(path) for path in (folder / "pictures").glob("*.tar"))
    source = SourceConfig(name="s", kind="pairs", shards=shards, batch=1, max_tokens=8)
    transform = ImageTransform(224, HALF, HALF)
    stream = Stream(source, 1, image_side=224)
    theirs_transform = open_clip.image_transform(224, is_train=False, mean=HALF, std=HALF)

    def ours() -> int:
        for position in range(200):
            transform(stream[position].items[0].image)  # type: ignore[union-attr]
        return 200

    def theirs() -> int:
        stream = wds.WebDataset(files, shardshuffle=4, seed=1).shuffle(200).decode("pilrgb")  # type: ignore
        return sum(theirs_transform(sample["jpg"]).shape[0] // 3 for sample in stream)  # type: ignore

    return compare(ours, theirs)


# -- packing -------------------------------------------------------------------------------


def packing(folder: Path) -> dict:
    """Share of real tokens in packed rows: captions of 5 to 40 words, documents of up to 250."""
    from flamingo.data.document import Document, Text

    random = np.random.default_rng(0)

    def batch(low: int, high: int, count: int):
        lengths = random.integers(low, high, size=count)
        documents = [Document((Text("word " * int(n)),), "k") for n in lengths]
        transform = ImageTransform(4, HALF, HALF)
        return Collator(word_tokenizer(), transform, 1, 2, max_tokens=256)(documents)

    real = total = padded = 0
    for _ in range(20):
        sources = [batch(5, 40, 64), batch(40, 250, 32)]
        (rows,) = packed(sources, 512, image_token_id=1)
        real += sum(int(source.attention_mask.sum()) for source in sources)
        total += len(rows.input_ids) * 512
        padded += sum(source.input_ids.numel() for source in sources)
    return {"real_tokens": round(real / total, 4), "real_tokens_unpacked": round(real / padded, 4)}


PARTS = {"order": order, "state": state, "reading": reading, "pictures": pictures, "packing": packing}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            print(json.dumps({"part": name, **PARTS[name](Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
