"""Shots that resemble their query: every backend finds the same, and no index outlives its data."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from flamingo.config import ADDED_TOKENS, FlamingoConfig, FlamingoVisionConfig
from flamingo.eval import embedding, retrieval
from flamingo.eval import vectors as stored
from flamingo.eval.benchmarks import Example
from flamingo.eval.commands import app
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Setting, choose_shots
from flamingo.eval.retrieval import milvus
from flamingo.eval.retrieval.places import Milvus, place
from flamingo.eval.retrieval.search import Faiss, nearest
from flamingo.eval.task import Task
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor

pymilvus = pytest.importorskip("pymilvus")
NAME = "some_gallery.walls"
CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 1, "vocab_size": 49408, "context_length": 16},
}
WORDS = ["what", "is", "on", "this", "wall", "a", "picture", "of", "number", "0", "1", "2", "3"]
POOL = 12


def clip_folder(out: Path, seed: int = 0) -> str:
    """A tiny CLIP with random weights, as open_clip loads it."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(
        CLIP["embed_dim"],
        open_clip.CLIPVisionCfg(**CLIP["vision_cfg"]),
        open_clip.CLIPTextCfg(**CLIP["text_cfg"]),
    )
    torch.save(model.state_dict(), out / "open_clip_pytorch_model.bin")
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    return f"open_clip:local-dir:{out}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def flamingo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Flamingo that knows the words of the questions."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i for i, word in enumerate(WORDS, 3)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED_TOKENS)})
    text = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=known,
    )
    grid = FlamingoVisionConfig(
        source="timm",
        name="test_efficientnet",
        image_size=64,
        width=256,
        grid=[2, 2],
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    torch.manual_seed(0)
    config = FlamingoConfig(
        text_config=text,
        vision_config=grid,
        first_added_token_id=known,
        end_of_chunk_token_id=known,
        image_token_id=known + 1,
        resampler_depth=1,
        resampler_width=16,
        resampler_heads=2,
        resampler_head_dim=8,
        resampler_latents=2,
        cross_attention_every=1,
        cross_attention_heads=2,
        cross_attention_head_dim=8,
    )
    folder = tmp_path_factory.mktemp("flamingo")
    FlamingoForConditionalGeneration(config).save_pretrained(folder)
    FlamingoProcessor.for_model(config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def predictor(flamingo: Path) -> SimpleNamespace:
    """What of `Predictor` retrieval looks at."""
    own = embedding.Own.load(str(flamingo))
    return SimpleNamespace(model=own.model, processor=own.processor)


def paint(file: Path, seed: int) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 40), Image.Resampling.NEAREST).save(file)
    return file


@pytest.fixture
def gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark of 12 demonstrations and 5 queries, three of whose pictures hang in both splits."""
    folder = tmp_path / "walls"
    folder.mkdir()
    for number in range(POOL):
        paint(folder / f"train{number}.png", number)
    for number in range(5):
        paint(folder / f"test{number}.png", number if number < 3 else 100 + number)

    def examples(data: Path, split: str) -> list[Example]:
        files = sorted(data.glob(f"{split}*.png"), key=lambda f: int(f.stem.removeprefix(split)))
        words = json.loads((data / "words.json").read_text()) if (data / "words.json").exists() else {}
        return [
            Example(f.stem, f, words.get(f.stem, f"what is on wall number {i % 4}"), ("a picture",))
            for i, f in enumerate(files)
        ]

    module = ModuleType(NAME)
    vars(module).update(
        TITLE="Walls",
        DESCRIPTION="what hangs there",
        LICENCE="none",
        SOURCE="nowhere",
        FILES={"train": (), "test": ()},
        QUERIES="test",
        DEMONSTRATIONS="train",
        METRICS=("exact_match",),
        MAX_NEW_TOKENS=3,
        BLIND=None,
        examples=examples,
        prompt=lambda e: e.question,
        completion=lambda e: " a picture",
        tidy=str.strip,
    )
    monkeypatch.setitem(sys.modules, "some_gallery", ModuleType("some_gallery"))
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "cache"))
    return folder


def config(data: Path, index: str | Path | None, **fields: Any) -> EvalConfig:
    where = None if index is None else str(index)
    fixed = {"shots": (2,), "shots_from": "similar", "control_limit": 0}
    return EvalConfig(benchmark=NAME, data=data, index=where, **{**fixed, **fields})


def found(config: EvalConfig, predictor: Any, rank: int = 0, world: int = 1) -> dict[str, list[str]]:
    """Ids of the neighbours of each query."""
    near = retrieval.neighbours(config, Task.of(config), predictor, rank, world)
    return {query: [shot.id for shot in shots] for query, shots in near.items()}


# -- search --------------------------------------------------------------------------------


def tied(seed: int = 0, rows: int = 400, width: int = 24) -> np.ndarray:
    """float32[R, D] of length 1, many of them twice, and 90 of them one and the same."""
    random = np.random.default_rng(seed)
    vectors = random.integers(-2, 3, (rows, width)).astype(np.float32)
    vectors[:90], vectors[200:300] = vectors[0], vectors[100:200]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def plainly(vectors: np.ndarray, query: np.ndarray, need: int) -> list[int]:
    scores = (vectors.astype(np.float64) @ query.astype(np.float64)).round(6)
    return sorted(range(len(vectors)), key=lambda row: (-scores[row], row))[:need]


def collection(file: Path, vectors: np.ndarray) -> milvus.Address:
    where = milvus.Address(str(file), "some")
    made = retrieval.Manifest(
        benchmark="walls",
        similarity="image",
        encoder="none",
        weights={},
        examples=len(vectors),
        ids="",
        texts="",
        pictures="",
        rows=len(vectors),
        width=vectors.shape[1],
        versions={},
    )
    with milvus.connected(where) as client:
        milvus.write(client, where, made, vectors, [""] * len(vectors))
    return where


def test_faiss_and_milvus_lite_find_the_same_whatever_is_tied(tmp_path):
    vectors = tied()
    queries = np.concatenate([vectors[::37], tied(seed=1)[:20]])
    alone = [[row] for row in range(len(vectors))]
    expected = [plainly(vectors, query, 24) for query in queries]
    assert nearest(Faiss(vectors), queries, alone, 24) == expected
    where = collection(tmp_path / "x.db", vectors)
    with milvus.connected(where) as client:
        backend = milvus.Collection(client, where)
        assert nearest(backend, queries, alone, 24) == expected
        backend.most = 50  # the 90 that are the same do not fit: all vectors are fetched
        assert nearest(backend, queries, alone, 24) == expected
        np.testing.assert_array_equal(backend.vectors(np.arange(len(vectors))), vectors)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the wheel's one kernel"
)
def test_faiss_multiplies_with_kernels_of_this_processor_and_leaves_the_environment():
    script = (
        "import os, numpy\n"
        "from flamingo.eval.retrieval.search import Faiss\n"
        "Faiss(numpy.eye(4, dtype=numpy.float32))\n"
        "assert 'OPENBLAS_CORETYPE' not in os.environ\n"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, "OPENBLAS_VERBOSE": "2"},  # each OpenBLAS names its kernels as it is loaded
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Prescott" not in done.stdout + done.stderr


def test_kernels_that_the_user_names_for_openblas_stand(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    Faiss(np.eye(4, dtype=np.float32))
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"


def test_what_is_barred_makes_room_for_the_next():
    vectors = tied()
    alone = [[row] for row in range(len(vectors))]
    (near,) = nearest(Faiss(vectors), vectors[:1], alone, 24, lambda query, position: position < 88)
    assert near[:2] == [88, 89] and len(near) == 24
    assert near == [row for row in plainly(vectors, vectors[0], 400) if row >= 88][:24]


def test_demonstrations_with_one_content_share_a_row_and_come_in_order():
    vectors = np.eye(3, 4, dtype=np.float32)
    assert nearest(Faiss(vectors), vectors[1:2], [[0, 4], [3, 5], [1, 2]], 4) == [[3, 5, 0, 1]]
    assert nearest(Faiss(vectors), vectors[1:2], [[0, 4], [3, 5], [1, 2]], 99) == [[3, 5, 0, 1, 2, 4]]


# -- indexes -------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """A Milvus that speaks over the network: Milvus Lite's."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    running, database, port = start_server_in_thread(str(tmp_path / "served"), host="127.0.0.1", port=0)
    yield f"http://127.0.0.1:{port}"
    running.stop(grace=0)
    database.close()


@pytest.mark.parametrize("similarity", ["image", "text", "both"])
def test_a_folder_a_file_and_a_server_give_the_same_neighbours(
    gallery, clip, predictor, tmp_path, server, similarity
):
    near = []
    for out in (str(tmp_path / "index"), str(tmp_path / "x.db"), server):
        address, made = retrieval.build_index(NAME, gallery, out, clip, similarity)
        assert (made.examples, made.rows) == (POOL, 4 if similarity == "text" else POOL)
        near.append(found(config(gallery, out, similarity=similarity), predictor))
        assert found(config(gallery, address, similarity=similarity), predictor) == near[-1]
    assert near[0] == near[1] == near[2]
    assert {query: len(shots) for query, shots in near[0].items()} == {
        f"test{number}": POOL - (number < 3) for number in range(5)
    }


def test_neighbours_are_the_nearest_by_the_mean_of_the_cosines(gallery, clip, predictor, tmp_path):
    """Against open_clip's own features."""
    retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip, "both")
    task = Task.of(config(gallery, tmp_path / "index"))
    made: Any = open_clip.create_model_and_transforms(clip.removeprefix("open_clip:"))
    model, _, prepare = made
    tokens = open_clip.get_tokenizer(clip.removeprefix("open_clip:"))
    model.eval()

    def features(examples: list[Example]) -> list[torch.Tensor]:
        pixels = torch.stack([prepare(Image.open(e.image).convert("RGB")) for e in examples])
        words = tokens([e.question for e in examples])
        return [model.encode_image(pixels, normalize=True), model.encode_text(words, normalize=True)]

    with torch.no_grad():
        ours, theirs = features(task.queries), features(task.pool)
    image, text = (a @ b.T for a, b in zip(ours, theirs, strict=True))
    for similarity, scores in (("image", image), ("text", text), ("both", (image + text) / 2)):
        near = found(config(gallery, tmp_path / "index", similarity=similarity), predictor)
        for query, row in zip(task.queries, scores.tolist(), strict=True):
            same = {f"train{query.id[-1]}"} if query.id < "test3" else set()
            order = sorted(range(POOL), key=lambda at: (-round(row[at], 6), at))
            expected = [task.pool[at].id for at in order if task.pool[at].id not in same]
            assert near[query.id] == expected


def test_the_query_its_picture_and_its_copies_are_never_its_shots(gallery, clip, predictor, tmp_path):
    """The picture of test0 is train0's, in another file."""
    retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip)
    (gallery / "test0.png").rename(gallery / "test0.tmp")
    (gallery / "test0.png").write_bytes((gallery / "train0.png").read_bytes())
    near = found(config(gallery, tmp_path / "index"), predictor)
    assert all(f"train{n}" not in near[f"test{n}"] for n in range(3))
    itself = config(gallery, tmp_path / "index", split="train", shots=(8,))
    near = found(itself, predictor)
    assert all(query not in shots and len(shots) == POOL - 1 for query, shots in near.items())
    task = Task.of(itself)
    task.neighbours = retrieval.neighbours(itself, task, predictor, 0, 1)
    query = task.queries[3]
    shots = choose_shots(task.pool, query, Setting(shots=8, source="similar"), task.neighbours)
    assert [shot.id for shot in shots] == near[query.id][:8][::-1]  # the nearest stands last


def test_without_an_index_the_models_own_encoder_is_used(gallery, flamingo, predictor, tmp_path):
    near = found(config(gallery, None, similarity="both"), predictor)
    retrieval.build_index(NAME, gallery, str(tmp_path / "index"), f"model:{flamingo}", "both")
    assert found(config(gallery, tmp_path / "index", similarity="both"), predictor) == near
    task = Task.of(config(gallery, None))
    model, processor = predictor.model, predictor.processor
    made = embedding.Own("model", model, processor)
    image, question = task.pool[0].image, task.pool[0].question
    with torch.inference_mode():
        pixels = processor.image_processor([str(image)])["pixel_values"]
        grid = model.encode_images(pixels)[0].mean(0)
        ids = processor.tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
        words = model.get_input_embeddings()(ids)[0].mean(0)
    for got, mean in ((made.embed("image", [image])[0], grid), (made.embed("text", [question])[0], words)):
        np.testing.assert_allclose(got, (mean / mean.norm()).numpy(), atol=1e-6)
        assert math.isclose(np.linalg.norm(got), 1, abs_tol=1e-6)


def test_training_does_not_outdate_an_index_by_the_frozen_encoder(gallery, flamingo, predictor, tmp_path):
    retrieval.build_index(NAME, gallery, str(tmp_path / "index"), f"model:{flamingo}", "both")
    with torch.no_grad():
        for parameter in predictor.model.resampler.parameters():
            parameter.add_(1)
    assert found(config(gallery, tmp_path / "index"), predictor)


def test_two_processes_find_together_what_one_finds(gallery, clip, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "CHUNK", 2)
    for folder in ("one", "two"):
        retrieval.build_index(NAME, gallery, str(tmp_path / folder), clip)
    whole = found(config(gallery, tmp_path / "one"), predictor)
    asked = config(gallery, tmp_path / "two")
    with ThreadPoolExecutor(2) as threads:
        halves = list(threads.map(lambda rank: found(asked, predictor, rank, 2), range(2)))
    assert [len(half) for half in halves] == [2, 3]
    assert halves[0] | halves[1] == whole


def test_each_vector_is_computed_once_however_many_want_it(gallery, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "CHUNK", 2)
    computed: list[str] = []

    class Counting(embedding.OpenClip):
        def embed(self, part, items):
            computed.extend(str(item) for item in items)
            return super().embed(part, items)

    encoder = Counting(clip.removeprefix("open_clip:"))
    items = {str(number): gallery / f"train{number}.png" for number in range(POOL)}
    with ThreadPoolExecutor(3) as threads:
        stores = [stored.Vectors(tmp_path / "kept", rank, 3) for rank in range(3)]
        got = list(threads.map(lambda store: store.get(encoder, "image", items), stores))
    assert sorted(computed) == sorted(map(str, items.values()))
    for vectors in got:
        np.testing.assert_array_equal(vectors, got[0])
    later = stored.Vectors(tmp_path / "kept").get(encoder, "image", items, ["7", "3"])
    np.testing.assert_array_equal(later, got[0][[7, 3]])
    assert len(computed) == POOL


def test_an_index_is_made_once_and_again_only_for_what_is_new(gallery, clip, tmp_path, monkeypatch):
    computed: list[Path] = []
    embed = embedding.OpenClip.embed

    def counted(self, part, items):
        computed.extend(items)
        return embed(self, part, items)

    monkeypatch.setattr(embedding.OpenClip, "embed", counted)
    for out in (str(tmp_path / "index"), str(tmp_path / "x.db")):
        computed.clear()
        first = retrieval.build_index(NAME, gallery, out, clip)
        assert len(computed) == POOL
        assert retrieval.build_index(NAME, gallery, out, clip) == first
        assert len(computed) == POOL
        before = (gallery / "train5.png").read_bytes()
        paint(gallery / "train5.png", 55)
        with pytest.raises(ValueError, match=r"another index \(their pictures changed\).*--rebuild"):
            retrieval.build_index(NAME, gallery, out, clip)
        again = retrieval.build_index(NAME, gallery, out, clip, rebuild=True)
        assert again[1].pictures != first[1].pictures
        assert computed[POOL:] == [gallery / "train5.png"]
        (gallery / "train5.png").write_bytes(before)


def test_an_interrupted_index_goes_on_where_it_stopped(gallery, clip, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "CHUNK", 5)
    computed: list[Path] = []
    embed = embedding.OpenClip.embed

    def stopped(self, part, items):
        if len(computed) == 5:
            computed.append(tmp_path)
            raise KeyboardInterrupt
        computed.extend(items)
        return embed(self, part, items)

    monkeypatch.setattr(embedding.OpenClip, "embed", stopped)
    with pytest.raises(KeyboardInterrupt):
        retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip)
    with pytest.raises(ValueError, match="is not there, or unfinished"):
        found(config(gallery, tmp_path / "index"), predictor)
    retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip)
    assert computed[6:] == [gallery / f"train{number}.png" for number in range(5, POOL)]


def change_picture(gallery: Path) -> None:
    paint(gallery / "train5.png", 55)


def change_question(gallery: Path) -> None:
    (gallery / "words.json").write_text('{"train5": "what is on this wall"}')


def change_pool(gallery: Path) -> None:
    (gallery / "train11.png").rename(gallery / "train12.png")


def grow_pool(gallery: Path) -> None:
    paint(gallery / "train12.png", 12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_picture, "their pictures changed"),
        (change_question, "their texts changed"),
        (change_pool, "the demonstrations changed"),
        (grow_pool, r"it holds 12 demonstrations, there are 13 \(pool=12"),
    ],
)
def test_an_index_of_other_data_is_refused(gallery, clip, predictor, tmp_path, change, said):
    outs = [str(tmp_path / "index"), str(tmp_path / "x.db")]
    for out in outs:
        retrieval.build_index(NAME, gallery, out, clip)
    change(gallery)
    for out in outs:
        with pytest.raises(ValueError, match=said) as refused:
            found(config(gallery, out), predictor)
        command = f"flamingo eval index {NAME} --out {out} --data {gallery} --similarity image --pool 2048"
        assert f"{command} --encoder {clip} --rebuild" in str(refused.value)
    if change is grow_pool:
        with pytest.raises(ValueError, match="1 are new, the first is 'train12'"):
            found(config(gallery, outs[0]), predictor)


def test_an_index_of_another_encoder_is_refused(gallery, predictor, flamingo, tmp_path):
    encoder = clip_folder(tmp_path / "clip")
    retrieval.build_index(NAME, gallery, str(tmp_path / "index"), encoder)
    clip_folder(tmp_path / "clip", seed=1)
    with pytest.raises(ValueError, match=r"the image encoder of open_clip:local-dir:\S+ changed.*--rebuild"):
        found(config(gallery, tmp_path / "index"), predictor)
    (tmp_path / "clip" / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="its encoder cannot be loaded"):
        found(config(gallery, tmp_path / "index"), predictor)
    retrieval.build_index(NAME, gallery, str(tmp_path / "own"), f"model:{flamingo}")
    with torch.no_grad():
        next(predictor.model.vision_encoder.parameters()).add_(1)
    # Another model is evaluated: the index has its own encoder, which is still there.
    assert found(config(gallery, tmp_path / "own"), predictor)


def test_an_index_of_something_else_is_refused(gallery, clip, predictor, tmp_path, monkeypatch):
    retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip)
    with pytest.raises(ValueError, match="compares by image, not by similarity=text; make another: flamingo"):
        found(config(gallery, tmp_path / "index", similarity="text"), predictor)
    with pytest.raises(ValueError, match="index .*nothing is not there, or unfinished; make it: flamingo"):
        found(config(gallery, tmp_path / "nothing"), predictor)
    monkeypatch.setitem(sys.modules, "some_gallery.doors", sys.modules[NAME])
    other = EvalConfig(**{**config(gallery, tmp_path / "index").model_dump(), "benchmark": "easy-vqa"})
    with pytest.raises(ValueError, match="is of walls, not of easy_vqa"):
        retrieval.neighbours(other, Task.of(config(gallery, None)), predictor, 0, 1)
    (tmp_path / "index" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not the manifest of an index"):
        found(config(gallery, tmp_path / "index"), predictor)


def test_a_milvus_keeps_indexes_apart(gallery, clip, flamingo, predictor, tmp_path):
    out = str(tmp_path / "x.db")
    one, _ = retrieval.build_index(NAME, gallery, out, clip)
    other, _ = retrieval.build_index(NAME, gallery, out, f"model:{flamingo}")
    assert one != other
    with pytest.raises(ValueError, match=r"several of walls: name one of \S+#flamingo_walls_image_"):
        found(config(gallery, out), predictor)
    assert found(config(gallery, one), predictor) != found(config(gallery, other), predictor)


# -- a Milvus that cannot be used ------------------------------------------------------------


def test_a_server_that_is_down_or_silent_is_told_of_in_time(gallery, clip, predictor, monkeypatch):
    monkeypatch.setattr(milvus, "CONNECT_SECONDS", 0.5)
    monkeypatch.setenv("FLAMINGO_MILVUS_TOKEN", "root:sesame")
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))
        for port in (silent.getsockname()[1], closed.getsockname()[1]):
            where = f"http://127.0.0.1:{port}"
            for use in (
                lambda at: found(config(gallery, at), predictor),
                lambda at: retrieval.build_index(NAME, gallery, at, clip),
            ):
                with pytest.raises(ValueError, match=f"Milvus {where} does not answer within") as refused:
                    use(where)
                assert "sesame" not in str(refused.value)


def test_a_token_comes_from_the_environment_and_is_never_shown(monkeypatch):
    given: list[str] = []

    def client(uri, token, timeout):
        given.append(token)
        raise pymilvus.MilvusException(message=f"bad token {token}")

    monkeypatch.setattr(pymilvus, "MilvusClient", client)
    monkeypatch.setenv("MILVUS_TOKEN", "sesame")
    for _ in range(2):
        with (
            pytest.raises(ValueError, match=r"bad token \*\*\*"),
            milvus.connected(milvus.Address("https://some")),
        ):
            pass
        monkeypatch.setenv("FLAMINGO_MILVUS_TOKEN", "open")
    assert given == ["sesame", "open"]
    with pytest.raises(ValueError, match="no password in an address.*FLAMINGO_MILVUS_TOKEN") as refused:
        place("http://root:sesame@some:19530")
    assert "sesame" not in str(refused.value)


def test_a_collection_of_something_else_is_refused_and_left_alone(gallery, clip, predictor, tmp_path):
    file = tmp_path / "x.db"
    with milvus.connected(milvus.Address(str(file))) as client:
        client.create_collection("theirs", dimension=5)
    where = f"{file}#theirs"
    for use in (
        lambda: found(config(gallery, where), predictor),
        lambda: retrieval.build_index(NAME, gallery, where, clip, rebuild=True),
    ):
        with pytest.raises(ValueError, match=r"#theirs was not made by.*vectors have 5 dimensions.*another"):
            use()
    with milvus.connected(milvus.Address(str(file))) as client:
        assert client.list_collections() == ["theirs"]


def test_a_collection_of_another_dimension_than_it_says_is_refused(gallery, clip, predictor, tmp_path):
    where, made = retrieval.build_index(NAME, gallery, str(tmp_path / "x.db"), clip)
    address = milvus.Address.of(where)
    assert address is not None
    with milvus.connected(address) as client:
        wrong = made.model_copy(update={"width": 99})
        milvus.write(client, address, wrong, np.eye(POOL, 16, dtype=np.float32), [""] * POOL)
    with pytest.raises(ValueError, match="vectors have 16 dimensions, those of open_clip.* 99"):
        found(config(gallery, where), predictor)


def test_an_unfinished_collection_is_not_used_and_is_made_again(gallery, clip, predictor, tmp_path):
    out = tmp_path / "x.db"
    where, made = retrieval.build_index(NAME, gallery, str(out), clip)
    near = found(config(gallery, out), predictor)
    address = milvus.Address.of(where)
    assert address is not None
    with milvus.connected(address) as client:
        client.delete(address.collection, ids=[milvus.MANIFEST])
    for at in (where, out):
        with pytest.raises(ValueError, match="is not there, or unfinished; make it: flamingo eval index"):
            found(config(gallery, at), predictor)
    assert retrieval.build_index(NAME, gallery, str(out), clip) == (where, made)
    assert found(config(gallery, out), predictor) == near
    with milvus.connected(address) as client:
        client.delete(address.collection, ids=[3])
    with pytest.raises(ValueError, match="11 rows, not the 12 that were written"):
        found(config(gallery, where), predictor)


def test_a_file_that_no_milvus_lite_of_today_wrote_is_refused(gallery, clip, tmp_path):
    (tmp_path / "x.db").write_bytes(b"SQLite format 3")
    with pytest.raises(ValueError, match=r"x\.db is a database of an older Milvus Lite"):
        retrieval.build_index(NAME, gallery, str(tmp_path / "x.db"), clip)


# -- encoders ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip", "encoder='clip': write open_clip:ARCHITECTURE/WEIGHTS"),
        ("open_clip:", "write open_clip:ARCHITECTURE/WEIGHTS"),
        ("open_clip:no_such_net/openai", "no architecture 'no_such_net'"),
        ("open_clip:ViT-B-32/nobody", "'nobody' is neither a file nor weights.*openai"),
        ("open_clip:ViT-B-32", "'' is neither a file nor weights"),
        ("open_clip:local-dir:/no/such", "no weights could be read"),
        ("model:/no/such", "model:/no/such: the folder holds no model"),
    ],
)
def test_an_encoder_that_is_not_there_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        embedding.load(name)


def test_weights_of_a_file_have_the_activation_of_their_architecture(tmp_path):
    (tmp_path / "tiny-quick.json").write_text(json.dumps({**CLIP, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "tiny-quick.json")
    clip_folder(tmp_path / "clip")
    made = embedding.load(f"open_clip:tiny-quick/{tmp_path / 'clip' / 'open_clip_pytorch_model.bin'}")
    assert isinstance(made, embedding.OpenClip)
    blocks = made.model.visual.transformer.resblocks
    assert type(blocks[0].mlp.gelu).__name__ == "QuickGELU"
    (tmp_path / "none.pt").write_text("no weights")
    with pytest.raises(ValueError, match="no weights could be read"):
        embedding.load(f"open_clip:tiny-quick/{tmp_path / 'none.pt'}")


def test_text_without_words_and_pictures_that_cannot_be_read_are_refused(gallery, clip, tmp_path):
    task = Task.of(config(gallery, None))
    keys = stored.picture_keys(tmp_path, [e.image for e in task.pool])
    silent = [replace(task.pool[0], question=" ")]
    with pytest.raises(ValueError, match="train0 has no question or other text to compare; choose image"):
        retrieval.Contents.of(silent, keys, "both")
    with_context = retrieval.Contents.of([replace(silent[0], context="a meme")], keys, "text")
    assert list(with_context.items["text"].values()) == ["a meme"]
    (gallery / "train0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"train0\.png cannot be read"):
        retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip)
    with pytest.raises(ValueError, match="similarity='sound': choose one of image, text, both"):
        retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip, "sound")
    with pytest.raises(ValueError, match=r"manifest is a file: name a folder"):
        (tmp_path / "manifest").touch()
        place(str(tmp_path / "manifest"))


def test_a_damaged_file_of_vectors_is_named(gallery, clip, tmp_path):
    retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip)
    (file,) = (tmp_path / "index").glob("image-*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"\.safetensors is damaged.*delete it"):
        retrieval.build_index(NAME, gallery, str(tmp_path / "index"), clip, rebuild=True, pool=5)


def test_a_picture_is_read_again_only_when_its_file_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SETTLED", -1.0)
    read: list[Path] = []
    content_key = stored._content_key
    monkeypatch.setattr(stored, "_content_key", lambda p: read.append(p) or content_key(p))
    files = [paint(tmp_path / f"{n}.png", n) for n in range(3)]
    first = stored.picture_keys(tmp_path / "kept", files)
    assert stored.picture_keys(tmp_path / "kept", files) == first
    assert sorted(read) == files
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes() + b" ")
    assert stored.picture_keys(tmp_path / "kept", files)[files[1]] != first[files[1]]
    assert read[3:] == files[1:2]
    (tmp_path / "kept" / "pictures.json").write_text("cut o")
    assert stored.picture_keys(tmp_path / "kept", files[:1]) == {files[0]: first[files[0]]}


# -- the command ---------------------------------------------------------------------------


def test_the_command_says_what_it_made_and_how_to_use_it(gallery, clip, tmp_path):
    out = tmp_path / "index"
    words = ["index", NAME, "--data", gallery, "--out", out, "--encoder", clip, "--similarity", "both"]
    said = CliRunner().invoke(app, [*map(str, words), "--pool", "7"])
    assert said.exit_code == 0, said.output
    assert "7 demonstrations, 7 vectors of 32" in said.output
    assert f"--shots-from similar --similarity both --pool 7 --index {out} --data {gallery}" in said.output
    assert json.loads((out / "manifest.json").read_text())["encoder"] == clip
    assert len(json.loads((out / "ids.json").read_text())) == 7
    refused = CliRunner().invoke(app, [*map(str, words)])
    assert refused.exit_code == 1 and "holds another index" in refused.output
    assert isinstance(place(str(tmp_path / "x.db")), Milvus)
