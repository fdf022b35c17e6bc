"""`flamingo clip embed` and `search`: what is indexed is found, and nothing is computed twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from flamingo.data.kinds._members import example_png
from flamingo.data.writing import write_tar
from flamingo.eval import embedding, retrieval, vectors
from flamingo.eval.clip import index
from flamingo.eval.retrieval.places import place
from tests import warm
from tests.clip.conftest import fails, paint, passes, run, write_encoder

pytest.importorskip("pymilvus")
PICTURES = 12


def hits(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in passes(done).splitlines()]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every picture or text that an encoder was given."""
    seen: list[str] = []
    whole = embedding.Encoder._embed

    def counted(self, part, items, faults):
        seen.extend(map(str, items))
        return whole(self, part, items, faults)

    monkeypatch.setattr(embedding.Encoder, "_embed", counted)
    return seen


# ---- embed -------------------------------------------------------------------------------------


def test_a_folder_is_indexed_with_its_captions(photos, encoder, tmp_path):
    said = passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    assert f"12 pictures, 12 vectors of 16: {tmp_path / 'index'}" in said
    found = hits(run("search", tmp_path / "index", "a thing", "--top", "99", "--json"))
    assert {hit["id"] for hit in found} == {p.relative_to(photos).as_posix() for p in photos.rglob("*.png")}
    (captioned,) = (hit for hit in found if hit["caption"])
    assert captioned["id"] == "red/0.png" and captioned["caption"] == "a red thing"
    assert captioned["where"] == str(photos / "red" / "0.png")
    assert [hit["rank"] for hit in found] == list(range(1, 13))


def test_scores_are_open_clips_cosines(photos, encoder, tmp_path):
    passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    found = hits(run("search", tmp_path / "index", "a red circle", "--top", "12", "--json"))
    name = f"local-dir:{encoder.removeprefix('open_clip:')}"
    made: Any = open_clip.create_model_from_pretrained(name)
    model, prepare = made[0].eval(), made[1]
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer(name)(["a red circle"]), normalize=True)
        for hit in found:
            picture = prepare(Image.open(hit["where"]).convert("RGB"))[None]
            cosine = (model.encode_image(picture, normalize=True) @ text.T).item()
            assert hit["score"] == pytest.approx(cosine, abs=2e-6)
    assert [h["score"] for h in found] == sorted((h["score"] for h in found), reverse=True)


def test_shards_are_indexed_and_a_missing_caption_does_no_harm(shards, encoder, tmp_path):
    passes(run("embed", shards, "--encoder", encoder, "--out", tmp_path / "index"))
    found = {h["id"]: h for h in hits(run("search", tmp_path / "index", "x", "--top", "99", "--json"))}
    assert sorted(found) == [f"pairs-{number // 5}.tar#{number:04}" for number in range(10)]
    assert found["pairs-0.tar#0003"]["caption"] == "number 3" and not found["pairs-1.tar#0007"]["caption"]
    assert found["pairs-0.tar#0003"]["where"] == str(tmp_path / "shards" / "pairs-0.tar") + "#0003"
    same = hits(run("search", tmp_path / "index", "--image", tmp_path / "made" / "6.png", "--json"))
    assert same[0]["id"] == "pairs-1.tar#0006" and same[0]["score"] == 1


def test_pictures_of_other_kinds_are_numbered_within_their_sample(encoder, tmp_path):
    items = [{"image": "0.png"}, {"text": "red."}, {"image": "1.png"}, {"text": "blue."}]
    sample = {
        "0.png": example_png("red"),
        "1.png": example_png(),
        "json": json.dumps({"items": items}).encode(),
    }
    from flamingo.data.kinds import load_kind

    load_kind("interleaved").read(sample, "x")  # the layout is what this test says
    write_tar(tmp_path / "pages.tar", [("page", sample)])
    arguments = [
        tmp_path / "pages.tar",
        "--kind",
        "interleaved",
        "--encoder",
        encoder,
        "--out",
        tmp_path / "i",
    ]
    passes(run("embed", *arguments))
    found = hits(run("search", tmp_path / "i", "x", "--json"))
    assert sorted(hit["id"] for hit in found) == ["pages.tar#page#0", "pages.tar#page#1"]
    assert {hit["caption"] for hit in found} == {"red. blue."}


def test_texts_are_indexed_line_by_line(photos, encoder, tmp_path):
    (tmp_path / "captions.txt").write_text("a red circle\n\n  a blue square \na red circle\n")
    said = passes(
        run("embed", tmp_path / "captions.txt", "--texts", "--encoder", encoder, "--out", tmp_path / "t")
    )
    assert "3 texts, 2 vectors of 16" in said
    found = hits(run("search", tmp_path / "t", "a red circle", "--json"))
    assert [h["id"] for h in found] == ["captions.txt:1", "captions.txt:4", "captions.txt:3"]
    assert [h["score"] for h in found[:2]] == [1, 1] and found[2]["caption"] == "a blue square"
    of_picture = hits(run("search", tmp_path / "t", "--image", photos / "red" / "0.png", "--json"))
    assert len(of_picture) == 3


def test_what_lies_in_several_places_is_found_in_all(photos, encoder, tmp_path):
    (photos / "blue" / "copy.png").write_bytes((photos / "red" / "0.png").read_bytes())
    said = passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    assert "13 pictures, 12 vectors" in said
    found = hits(
        run("search", tmp_path / "index", "--image", photos / "red" / "0.png", "--top", "2", "--json")
    )
    assert [h["id"] for h in found] == ["blue/copy.png", "red/0.png"] and found[0]["score"] == 1


def test_vectors_go_to_other_programs(photos, encoder, tmp_path):
    passes(
        run(
            "embed",
            photos,
            "--encoder",
            encoder,
            "--out",
            tmp_path / "i",
            "--npz",
            tmp_path / "out" / "v.npz",
        )
    )
    with np.load(tmp_path / "out" / "v.npz", allow_pickle=False) as file:
        assert file["vectors"].shape == (12, 16) and file["vectors"].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(file["vectors"], axis=1), 1, atol=1e-6)
        at = file["ids"].tolist().index("red/0.png")
        assert file["captions"][at] == "a red thing" and file["where"][at] == str(photos / "red" / "0.png")
        picture = embedding.load(encoder).embed("image", [photos / "red" / "0.png"])[0]
        np.testing.assert_allclose(file["vectors"][at], picture, atol=1e-6)


# ---- what is done is not done again --------------------------------------------------------------


def test_only_new_pictures_are_computed(photos, encoder, tmp_path, computed):
    for out in (tmp_path / "index", tmp_path / "x.db"):
        computed.clear()
        passes(run("embed", photos, "--encoder", encoder, "--out", out))
        assert len(computed) == PICTURES
        passes(run("embed", photos, "--encoder", encoder, "--out", out))
        assert len(computed) == PICTURES
        added = paint(photos / "red" / f"{out.stem}.png", 99 + len(out.stem))
        passes(run("embed", photos, "--encoder", encoder, "--out", out))
        assert computed[PICTURES:] == [str(added)]
        assert hits(run("search", out, "--image", added, "--json"))[0]["where"] == str(added)
        added.unlink()
        assert "12 pictures" in passes(run("embed", photos, "--encoder", encoder, "--out", out))


def embed_until_killed(photos: str, encoder: str, out: str) -> None:
    """The process gets a SIGKILL once the first chunk of vectors is written."""
    vectors.CHUNK = 5
    whole, asked = embedding.Encoder._embed, []

    def killed(self, part, items, faults):
        asked.append(part)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, part, items, faults)

    embedding.Encoder._embed = killed  # type: ignore[method-assign]
    index.embed([photos], out, encoder)


def test_killed_it_goes_on_where_it_was(photos, encoder, tmp_path, computed, monkeypatch):
    out = str(tmp_path / "index")
    child = multiprocessing.get_context(warm.METHOD).Process(
        target=embed_until_killed, args=(str(photos), encoder, out)
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    fails(run("search", out, "x"), "is not there, or unfinished; make it: flamingo clip embed")
    monkeypatch.setattr(vectors, "CHUNK", 5)
    passes(run("embed", photos, "--encoder", encoder, "--out", out))
    assert len(computed) == PICTURES - 5


# ---- what cannot be read ------------------------------------------------------------------------


def test_pictures_that_cannot_be_read_are_named_and_left_out(photos, encoder, tmp_path, computed):
    (photos / "red" / "broken.png").write_bytes((photos / "red" / "0.png").read_bytes()[:80])
    (photos / "red" / "empty.jpg").touch()
    (photos / "red" / "gone.png").symlink_to(tmp_path / "nowhere")
    for _ in range(2):
        done = run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index")
        assert "12 pictures, 12 vectors" in passes(done)
        assert f"left out: {photos / 'red' / 'broken.png'}: damaged image" in done.stderr
        assert "empty.jpg" in done.stderr and "gone.png: No such file" in done.stderr
        assert "3 cannot be read and are left out" in done.stderr
    assert len(computed) == PICTURES + 2 + 2  # the good ones once
    strict = run("embed", photos, "--encoder", encoder, "--out", tmp_path / "other", "--max-bad", "0.1")
    fails(strict, "3 of 15 cannot be read, more than --max-bad 0.1", "gone.png")
    assert not (tmp_path / "other" / "manifest.json").exists()


def test_bad_samples_of_shards_are_left_out(encoder, tmp_path):
    good = {"png": example_png(), "txt": b"good"}
    samples = [("0", good), ("1", {"txt": b"no picture"}), ("2", {"png": b"damaged", "txt": b"x"})]
    write_tar(tmp_path / "s.tar", samples)
    done = run("embed", tmp_path / "s.tar", "--encoder", encoder, "--out", tmp_path / "i", "--max-bad", "0.7")
    assert "1 pictures, 1 vectors" in passes(done)
    assert "s.tar#1: missing member" in done.stderr and "s.tar#2: damaged image" in done.stderr


def test_nothing_but_broken_pictures_is_an_error(encoder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no picture")
    done = run("embed", tmp_path / "bad", "--encoder", encoder, "--out", tmp_path / "i", "--max-bad", "1")
    fails(done, "1 of 1 cannot be read, nothing is left", "a.jpg")


def test_sources_without_pictures_are_refused(encoder, tmp_path):
    (tmp_path / "empty").mkdir()
    common = ["--encoder", encoder, "--out", tmp_path / "i"]
    fails(run("embed", tmp_path / "empty", *common), "empty: no picture in it (JPEG")
    fails(run("embed", tmp_path / "no.png", *common), "no.png is not there")
    fails(run("embed", tmp_path / "no-*.tar", *common), "no-*.tar", "matches no file")
    fails(run("embed", tmp_path / "empty", "--texts", *common), "empty cannot be read")
    (tmp_path / "blank.txt").write_text(" \n\n")
    fails(run("embed", tmp_path / "blank.txt", "--texts", *common), "no line of text")
    fails(run("embed", tmp_path / "blank.txt", "--texts", "--kind", "obelics", *common), "leave them out")
    (tmp_path / "picture.txt").write_bytes(example_png())
    fails(run("embed", tmp_path / "picture.txt", "--texts", *common), "not a text file in UTF-8")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clip", "encoder='clip': write open_clip:ARCHITECTURE/WEIGHTS"),
        ("open_clip:no_such_net/openai", "no architecture 'no_such_net'"),
        ("open_clip:/no/such/folder", "nor is this a folder with open_clip_config.json"),
    ],
)
def test_an_encoder_that_is_not_there_is_refused(photos, tmp_path, name, said):
    fails(run("embed", photos, "--encoder", name, "--out", tmp_path / "i"), said)


def test_a_folder_of_weights_that_are_damaged_is_refused(photos, tmp_path):
    folder = write_encoder(tmp_path / "clip")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(
        run("embed", photos, "--encoder", f"open_clip:{folder}", "--out", tmp_path / "i"),
        "no weights could be read",
    )
    weights.unlink()
    fails(
        run("embed", photos, "--encoder", f"open_clip:{folder}", "--out", tmp_path / "i"),
        "no weights could be read",
    )


def test_an_index_of_other_things_is_not_replaced_unasked(photos, shards, encoder, tmp_path):
    for out in (tmp_path / "index", tmp_path / "x.db"):
        passes(run("embed", photos, "--encoder", encoder, "--out", out))
        other = run("embed", shards, "--encoder", encoder, "--out", out)
        fails(other, "12 of its items are not among these", "--rebuild")
        assert "10 pictures" in passes(run("embed", shards, "--encoder", encoder, "--out", out, "--rebuild"))
        both = run("embed", shards, photos, "--encoder", encoder, "--out", out)
        assert "22 pictures" in passes(both)
    again = write_encoder(tmp_path / "again", seed=1)
    fails(
        run("embed", photos, "--encoder", f"open_clip:{again}", "--out", tmp_path / "index"),
        "its encoder is open_clip:",
    )


def test_indexes_of_examples_and_of_pictures_are_not_mixed_up(photos, encoder, tmp_path):
    passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    with pytest.raises(
        ValueError, match=r"an index of `flamingo clip embed`, not one of `flamingo eval index`"
    ):
        place(str(tmp_path / "index")).held(retrieval.Manifest)
    where = (
        passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "x.db"))
        .split(": ")[1]
        .split("\n")[0]
    )
    assert place(str(tmp_path / "x.db")).held(retrieval.Manifest) == {}
    with pytest.raises(
        ValueError, match=r"an index of `flamingo clip embed`, not one of `flamingo eval index`"
    ):
        place(where).held(retrieval.Manifest)
    (tmp_path / "index" / "manifest.json").write_text("{}")
    fails(run("search", tmp_path / "index", "x"), "not the manifest of an index")


# ---- search ------------------------------------------------------------------------------------


def test_a_folder_and_milvus_lite_find_the_same_in_the_same_order(photos, encoder, tmp_path):
    (photos / "blue" / "copy.png").write_bytes((photos / "red" / "0.png").read_bytes())
    for out in ("index", "x.db"):
        passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / out))
    picture = str(photos / "gold" / "3.png")
    for query in (["a red circle"], ["--image", picture], ["a red circle", "--image", picture]):
        for top in ("1", "5", "99"):
            found = [
                hits(run("search", tmp_path / o, *query, "--top", top, "--json")) for o in ("index", "x.db")
            ]
            assert found[0] == found[1] and len(found[0]) == min(int(top), 13)


def test_a_picture_finds_itself_first_with_score_1(photos, encoder, tmp_path):
    passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    for picture in photos.rglob("*.png"):
        first, second = hits(run("search", tmp_path / "index", "--image", picture, "--top", "2", "--json"))
        assert first["where"] == str(picture) and first["score"] == 1 > second["score"]


def test_a_text_and_a_picture_ask_for_the_sum_of_both(photos, encoder, tmp_path):
    passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    picture = photos / "red" / "0.png"
    found = hits(run("search", tmp_path / "index", "a cat", "--image", picture, "--top", "1", "--json"))
    made = embedding.load(encoder)
    total = made.embed("text", ["a cat"])[0].astype(float) + made.embed("image", [picture])[0]
    other = made.embed("image", [Path(found[0]["where"])])[0]
    assert found[0]["score"] == pytest.approx(float(other @ total / np.linalg.norm(total)), abs=2e-6)


def test_hits_are_lines_to_read(photos, encoder, tmp_path):
    passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    lines = passes(
        run("search", tmp_path / "index", "--image", photos / "red" / "0.png", "--top", "3")
    ).splitlines()
    assert lines[0] == "  1  1.0000  red/0.png  a red thing" and len(lines) == 3


def test_queries_that_cannot_be_asked_are_refused(photos, encoder, tmp_path):
    passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    fails(run("search", tmp_path / "index"), "nothing is asked for")
    fails(run("search", tmp_path / "index", "  "), "nothing is asked for")
    fails(run("search", tmp_path / "index", "--image", tmp_path / "no.png"), "no.png cannot be read")
    fails(run("search", tmp_path / "nowhere", "x"), "nowhere is not there, or unfinished")
    assert run("search", tmp_path / "index", "x", "--top", "0").exit_code == 2


def test_another_encoder_than_the_indexs_is_refused(photos, tmp_path):
    first = write_encoder(tmp_path / "one")
    passes(run("embed", photos, "--encoder", f"open_clip:{first}", "--out", tmp_path / "index"))
    other = write_encoder(tmp_path / "two", seed=1)
    refused = run("search", tmp_path / "index", "x", "--encoder", f"open_clip:{other}")
    fails(refused, "is of another encoder (it is of open_clip:local-dir:", "cannot be compared")
    moved = first.rename(tmp_path / "moved")
    fails(run("search", tmp_path / "index", "x"), "its encoder cannot be loaded", "say where with --encoder")
    assert hits(run("search", tmp_path / "index", "x", "--encoder", f"open_clip:{moved}", "--json"))
    write_encoder(first, seed=2)
    fails(run("search", tmp_path / "index", "x"), "the image encoder of", "changed")


def test_several_indexes_in_one_milvus_are_told_apart(photos, encoder, siglip, tmp_path):
    for name in (encoder, siglip):
        passes(run("embed", photos, "--encoder", name, "--out", tmp_path / "x.db"))
    fails(run("search", tmp_path / "x.db", "x"), "has several: name one of", "#flamingo_clip_image_")
    passes(run("embed", photos, "--encoder", encoder, "--out", f"{tmp_path / 'x.db'}#mine"))
    assert len(hits(run("search", f"{tmp_path / 'x.db'}#mine", "x", "--json"))) == 10


def test_an_index_that_lost_its_vectors_says_so(photos, encoder, tmp_path):
    passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    for file in (tmp_path / "index").glob("*.safetensors"):
        file.unlink()
    fails(run("search", tmp_path / "index", "x"), "lacks 12 of 12 vectors")
    passes(run("embed", photos, "--encoder", encoder, "--out", tmp_path / "index"))
    assert hits(run("search", tmp_path / "index", "x", "--json"))


def test_captions_longer_than_a_database_takes_are_cut(encoder, tmp_path):
    write_tar(tmp_path / "s.tar", [("0", {"png": example_png(), "txt": "\u00e4\u00df ".encode() * 40_000})])
    for out in ("index", "x.db"):
        passes(run("embed", tmp_path / "s.tar", "--encoder", encoder, "--out", tmp_path / out))
    found = [hits(run("search", tmp_path / out, "x", "--json")) for out in ("index", "x.db")]
    assert found[0] == found[1] and 1000 < len(found[0][0]["caption"]) < 60_000


def test_an_encoder_without_a_common_space_searches_pictures_by_pictures(photos, tmp_path):
    from tests.eval.harness_model import write_model

    name = f"model:{write_model(tmp_path / 'model')}"
    passes(run("embed", photos, "--encoder", name, "--out", tmp_path / "index"))
    found = hits(run("search", tmp_path / "index", "--image", photos / "red" / "0.png", "--json"))
    assert found[0]["id"] == "red/0.png"
    fails(
        run("search", tmp_path / "index", "a cat"), "no space that pictures and texts share", "--image alone"
    )
