"""pack, convert and index: the same input, the same bytes; whatever cannot be used is counted."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.data.config import SourceConfig
from flamingo.data.document import Image, Text
from flamingo.data.kinds._members import example_png as png
from flamingo.data.shards import ShardSet
from flamingo.data.stream import Stream
from flamingo.data.tools.executors import Executor, Task
from flamingo.data.tools.pack import FolderLayout, TableLayout
from flamingo.data.tools.planning import make_shards
from flamingo.data.writing import write_aside
from tests.data.tasks import die_or_say

ONE = Executor(workers=1)


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten captioned pictures in subfolders."""
    top = tmp_path / "images"
    for number in range(10):
        place = top / f"part {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png((number, 0, 0)))
        (place / f"{number}.txt").write_text(f"caption {number}")
    return top


def contents(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.tar")}


def captions(pattern: object, kind: str = "pairs") -> list[str]:
    """Texts of all samples, sorted."""
    source = SourceConfig(name="s", kind=kind, shards=str(pattern), batch=1, max_tokens=9)
    stream = Stream(source, seed=0)
    documents = [stream[position] for position in range(int(stream.shards.counts.sum()))]
    return sorted("".join(i.text for i in d.items if isinstance(i, Text)) for d in documents)


def test_a_folder_becomes_pairs_that_train(folder, tmp_path):
    out = tmp_path / "shards"
    said = run("pack", folder, out, "--samples-per-shard", 4, "--workers", 1)
    assert "10 samples in 3 shards of kind pairs" in said
    assert captions(out / "*.tar") == [f"caption {n}" for n in range(10)]
    assert ShardSet(str(out / "*.tar")).counts.tolist() == [4, 4, 2]
    card = json.loads((out / "dataset.json").read_text())
    assert card["counts"] == {"shards": 3, "samples": 10}
    assert set(card["files"]) == {path.name for path in out.glob("*.tar")}


def test_processes_parts_and_interruptions_give_the_same_bytes(folder, tmp_path):
    layout = FolderLayout(str(folder))

    def make(out: str, executor: Executor):
        return make_shards([folder], tmp_path / out, layout, name="s", samples=3, executor=executor)

    make("one", ONE)
    make("two", Executor(workers=2))
    assert make("parts", Executor(workers=1, part="2/2")).card is None
    assert not (tmp_path / "parts" / "dataset.json").exists()
    assert make("parts", Executor(workers=1, part="1/2")).card is not None
    make("again", ONE)
    stamp = (tmp_path / "again" / "s-000000.tar").stat().st_mtime_ns
    (tmp_path / "again" / "s-000001.tar").unlink()
    (tmp_path / "again" / "s-000002.tar").write_bytes(b"cut short")
    make("again", ONE)
    assert (tmp_path / "again" / "s-000000.tar").stat().st_mtime_ns == stamp  # was finished
    expected = contents(tmp_path / "one")
    assert len(expected) == 4
    for other in ("two", "parts", "again"):
        assert contents(tmp_path / other) == expected
        assert (tmp_path / other / "dataset.json").read_bytes() == (
            tmp_path / "one" / "dataset.json"
        ).read_bytes()


def test_what_a_killed_process_left_is_cleared_away_and_what_another_one_writes_is_not(tmp_path):
    shard = tmp_path / "s-0.tar"
    (tmp_path / ".s-0.tar.0123456789ab").write_bytes(b"half")
    (tmp_path / ".s-0.tar.backup").touch()

    def beside(path: Path) -> None:
        write_aside(shard, lambda other: other.write_bytes(b"other"))  # at the same time
        path.write_bytes(b"mine")

    write_aside(shard, beside)
    assert shard.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".s-0.tar.backup", "s-0.tar"]


def test_a_run_that_was_killed_goes_on_and_leaves_nothing_behind(folder, tmp_path):
    (folder / "part 0" / "large.png").write_bytes(png() + bytes(64 << 20))
    (folder / "part 0" / "large.txt").write_text("large")
    options = [str(folder), str(tmp_path / "out"), "--workers", "1", "--samples-per-shard", "4"]
    process = subprocess.Popen([sys.executable, "-m", "flamingo.cli", "data", "pack", *options])
    while process.poll() is None and not list((tmp_path / "out").glob(".shard-000001.*")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert "11 samples in 3 shards" in run("pack", *options)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {".cards", "dataset.json", *(f"shard-00000{n}.tar" for n in range(3))}


def test_a_size_in_megabytes_cuts_by_the_sizes_of_files(tmp_path):
    top = tmp_path / "images"
    top.mkdir()
    for number in range(6):
        # JPEG readers ignore what follows the picture; so does the size of a shard not.
        (top / f"{number}.png").write_bytes(png() + bytes(400_000))
        (top / f"{number}.txt").write_text("x")
    run("pack", top, tmp_path / "out", "--megabytes-per-shard", 1, "--workers", 1)
    assert ShardSet(str(tmp_path / "out" / "*.tar")).counts.tolist() == [3, 3]


def test_another_plan_needs_another_folder(folder, tmp_path):
    out = tmp_path / "out"
    run("pack", folder, out, "--samples-per-shard", 4, "--workers", 1)
    said = run("pack", folder, out, "--samples-per-shard", 5, "--workers", 1, status=1)
    assert "samples per shard was 4, is 5" in said
    (folder / "part 0" / "0.txt").write_text("another caption, of another length")
    (folder / "part 0" / "0.png").write_bytes(png("red"))
    assert "choose another folder" in run(
        "pack", folder, out, "--samples-per-shard", 4, "--workers", 1, status=1
    )


def test_a_caption_that_was_edited_is_another_plan(folder, tmp_path):
    out = tmp_path / "out"
    run("pack", folder, out, "--workers", 1)
    (folder / "part 0" / "0.txt").write_text("another caption")
    assert "choose another folder" in run("pack", folder, out, "--workers", 1, status=1)


def test_pictures_of_another_folder_are_another_plan(folder, tmp_path):
    table, out = tmp_path / "pages.jsonl", tmp_path / "out"
    write_table(table, [{"texts": [None, "x"], "images": ["0.png", None]}])
    said = run("convert", "obelics", table, out, "--workers", 1, status=1)
    assert "none of 1 pictures is there" in said and "delete" in said
    again = ["convert", "obelics", table, out, "--images", folder / "part 0", "--workers", 1]
    assert "choose another folder" in run(*again, status=1)  # and not: none is there
    shutil.rmtree(out)
    assert "1 samples in 1 shards" in run(*again)


def test_names_that_are_not_utf_8_are_packed(tmp_path):
    top = tmp_path / "images"
    top.mkdir()
    for name, number in (("фото ☃", 0), (os.fsdecode(b"\xff\xfe"), 1)):
        (top / f"{name}.png").write_bytes(png((number, 0, 0)))
        (top / f"{name}.txt").write_text(f"caption {number}")
    assert "2 samples in 1 shards" in run("pack", top, tmp_path / "out", "--workers", 1)
    assert captions(tmp_path / "out" / "*.tar") == ["caption 0", "caption 1"]


def test_rows_that_cannot_be_used_are_counted_and_the_others_stay(folder, tmp_path):
    (folder / "part 0" / "0.txt").write_text(" ")
    (folder / "part 0" / "2.png").write_bytes(b"GIF89a")
    (folder / "part 0" / "4.txt").unlink()
    outside = tmp_path / "secret.png"
    outside.write_bytes(png())
    (folder / "part 0" / "6.png").unlink()
    (folder / "part 0" / "6.png").symlink_to(outside)
    said = run("pack", folder, tmp_path / "out", "--workers", 1)
    assert "6 samples in 1 shards" in said
    for fault in ("1 x no text", "1 x not a picture", "1 x missing member", "1 x path outside"):
        assert fault in said
    assert captions(tmp_path / "out" / "*.tar") == [f"caption {n}" for n in (1, 3, 5, 7, 8, 9)]


def rows(folder: Path) -> list[dict[str, str]]:
    return [{"image": f"part {n % 2}/{n}.png", "text": f'a "quoted",\ncaption {n}'} for n in range(10)]


def write_table(path: Path, listed: list[dict]) -> None:
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(listed[0]))
            writer.writeheader()
            writer.writerows(listed)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in listed))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(listed), path, row_group_size=4)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_any_form_gives_the_same_shards(folder, tmp_path, ending):
    table = folder / f"table{ending}"
    write_table(table, rows(folder))
    out = tmp_path / "out"
    make_shards([table], out, TableLayout(str(folder), text="text"), name="s", samples=3, executor=ONE)
    assert captions(out / "*.tar") == sorted(row["text"] for row in rows(folder))
    assert ShardSet(str(out / "*.tar")).counts.tolist() == [3, 3, 3, 1]
    reference = tmp_path / "reference.jsonl"
    write_table(reference, rows(folder))
    make_shards(
        [reference], tmp_path / "b", TableLayout(str(folder), text="text"), name="s", samples=3, executor=ONE
    )
    assert contents(out) == contents(tmp_path / "b")


def test_a_csv_of_a_spreadsheet_and_a_parquet_with_pictures_inside_are_read(folder, tmp_path):
    """A byte order mark, line ends of Windows, line breaks in fields; structs of bytes and path."""
    table = folder / "sheet.csv"
    lines = [f'part {n % 2}/{n}.png,"caption\r\n{n}"\r\n' for n in range(7)]
    table.write_bytes(("image,text\r\n" + "".join(lines)).encode("utf-8-sig"))
    options = ["--text-column", "text", "--samples-per-shard", 3, "--workers", 1]
    assert "7 samples in 3 shards" in run("pack", table, tmp_path / "a", *options)
    assert captions(tmp_path / "a" / "*.tar") == [f"caption\r\n{n}" for n in range(7)]
    held = tmp_path / "held.parquet"
    write_table(
        held, [{"image": {"bytes": png((n, 0, 0)), "path": "gone.png"}, "text": f"{n}"} for n in range(7)]
    )
    assert "7 samples in 3 shards" in run("pack", held, tmp_path / "b", *options)
    assert captions(tmp_path / "b" / "*.tar") == [f"{n}" for n in range(7)]


@pytest.mark.slow
def test_a_process_that_dies_fails_its_own_shard_alone(tmp_path):
    words = ["a", "die", "b", "once", "c"]
    tasks = [Task(f"{n}", die_or_say, (str(tmp_path / "mark"), word)) for n, word in enumerate(words)]
    outcome = Executor(workers=2).run(tasks, "saying")
    assert outcome.results == {"0": "a", "2": "b", "3": "once", "4": "c"}
    assert "its process died" in outcome.failures["1"]


def test_several_tables_share_a_shard(folder, tmp_path):
    tables = [tmp_path / "1.jsonl", tmp_path / "2.csv"]
    for table, part in zip(tables, (rows(folder)[:5], rows(folder)[5:]), strict=True):
        write_table(table, part)
    layout = TableLayout(str(folder), text="text")
    make_shards(tables, tmp_path / "out", layout, name="s", samples=4, executor=ONE)
    shards = ShardSet(str(tmp_path / "out" / "*.tar"))
    assert shards.counts.tolist() == [4, 4, 2]
    assert list(chain.from_iterable(shards.keys())) == [f"{n:09d}" for n in range(10)]


def test_saved_hugging_face_data_sets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [{"bytes": png((n, 0, 0)), "path": None} for n in range(7)],
        "words": [f"w{n}" for n in range(7)],
    }
    features = datasets.Features({"image": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    options = ["--text-column", "words", "--samples-per-shard", 3, "--workers", 1]
    said = run("pack", tmp_path / "saved", tmp_path / "out", *options)
    assert "7 samples in 3 shards" in said
    assert captions(tmp_path / "out" / "*.tar") == [f"w{n}" for n in range(7)]


def test_questions_and_items_become_their_kinds(folder, tmp_path):
    asked = tmp_path / "asked.csv"
    listed = [
        {"image": "part 0/0.png", "q": "why?", "a": '["so", "so", "no"]'},
        {"image": "part 1/1.png", "q": "who?", "a": "me"},
        {"image": "part 1/1.png", "q": "", "a": "me"},
    ]
    write_table(asked, listed)
    columns = ["--question-column", "q", "--answer-column", "a"]
    said = run("pack", asked, tmp_path / "vqa", *columns, "--image-root", folder, "--workers", 1)
    assert "of kind vqa" in said
    assert "1 x no text" in said
    expected = ["Question: who? Answer: me", "Question: why? Answer: so"]
    assert captions(tmp_path / "vqa" / "*.tar", "vqa") == expected
    pages = tmp_path / "pages.jsonl"
    data = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    items = [{"image": "part 0/0.png"}, {"text": "q", "loss": False}, {"image": data}, {"text": "a"}]
    write_table(
        pages, [{"items": items}, {"items": [{"text": "q", "loss": False}]}, {"items": [{"image": 7}]}]
    )
    said = run(
        "pack", pages, tmp_path / "out", "--items-column", "items", "--image-root", folder, "--workers", 1
    )
    assert "1 samples in 1 shards of kind interleaved" in said
    stream = Stream(
        SourceConfig(name="s", kind="interleaved", shards=str(tmp_path / "out/*.tar"), batch=1, max_tokens=9),
        0,
    )
    assert [type(item) for item in stream[0].items] == [Image, Text, Image, Text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv", "out", "--text-column", "t"], "missing.csv is not there"),
        (["table.jsonl", "out"], "name the columns of a table"),
        (["table.jsonl", "out", "--text-column", "nope"], "no column 'nope'; it has image, text"),
        (["table.jsonl", "out", "--text-column", "text", "--part", "3/2"], "--part must be i/n"),
        (["table.jsonl", "out", "--text-column", "text", "--executor", "slurm"], "--executor must be one of"),
        (["table.jsonl", "out", "--text-column", "text", "--address", "x"], "is for --executor ray"),
        (["table.jsonl", "taken", "--text-column", "text"], "is not empty and holds something else"),
        (["table.jsonl", "out", "--text-column", "text", "--image-root", "taken"], "none of the rows"),
        (["empty.jsonl", "out", "--text-column", "text"], "there is no row"),
        (["broken.jsonl", "out", "--text-column", "text"], "broken.jsonl, byte 24: not JSON"),
        (["ragged.csv", "out", "--text-column", "text"], "3 fields, but 2 columns"),
        (["table.jsonl", "out", "--text-column", "text", "--samples-per-shard", "1",
          "--megabytes-per-shard", "1"], "either --samples-per-shard or --megabytes-per-shard"),
        (["table.jsonl", "table.jsonl", "out", "--text-column", "text"], "table.jsonl is given twice"),
        (["table.jsonl", "other/table.jsonl", "out", "--text-column", "text"], "name --image-root"),
        (["table.jsonl", "out", "--text-column", "text", "--name", "../x"], "--name '../x': letters"),
        (["images", "out", "--text-column", "text"], "a folder has its captions in .txt"),
        (["images", "out", "--image-column", "picture"], "a folder has its captions in .txt"),
        (["images", "out", "--executor", "ray"], "--workers 1 is for --executor local"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_table(Path("table.jsonl"), rows(folder))
    Path("empty.jsonl").write_text("\n")
    Path("broken.jsonl").write_text('{"image": 1, "text": 2}\n{]\n')
    Path("ragged.csv").write_text("image,text\na,b,c\n")
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    Path("other").mkdir()
    write_table(Path("other/table.jsonl"), rows(folder))
    assert message in run("pack", *arguments, "--workers", 1, status=1).replace("\n", " ")
    assert not list(Path(".").rglob("dataset.json"))


def mmc4_row(number: int) -> dict:
    info = [
        {"image_name": f"{number}.png", "raw_url": "http://a", "matched_text_index": 0, "matched_sim": 0.3},
        {"image_name": "gone.jpg", "raw_url": "https://a/gone", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "../x.png", "image_base64": base64.b64encode(png("red")).decode(),
         "matched_text_index": 1, "matched_sim": 0.4},
    ]  # fmt: skip
    return {"text_list": [f"a{number}", "b"], "image_info": info, "url": "https://a",
            "similarity_matrix": [[0.3, 0.0], [0.0, 0.3], [0.1, 0.4]]}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
def test_mmc4_as_published_becomes_shards_of_whole_pages(tmp_path, zipped):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(png("blue"))
    text = "".join(json.dumps(mmc4_row(number)) + "\n" for number in range(3))
    text += json.dumps({**mmc4_row(9), "image_info": [], "similarity_matrix": []}) + "\n"
    source = tmp_path / "docs_0.jsonl"
    source.write_text(text)
    if zipped:
        with zipfile.ZipFile(tmp_path / "docs.zip", "w") as archive:
            archive.write(source, source.name)
        source = tmp_path / "docs.zip"
    said = run("convert", "mmc4", source, tmp_path / "out", "--images", images, "--workers", 1)
    assert "3 samples in 1 shards of kind mmc4" in said
    assert "1 x no image" in said
    assert captions(tmp_path / "out" / "*.tar", "mmc4") == ["a0b", "a1b", "a2b"]
    sample = ShardSet(str(tmp_path / "out" / "*.tar")).read(0, 0)
    page = json.loads(sample["json"])
    assert [info["image_name"] for info in page["image_info"]] == ["0.png", "2.png"]
    assert page["similarity_matrix"] == [[0.3, 0.0], [0.1, 0.4]]
    assert page["url"] == "https://a"
    assert "image_base64" not in page["image_info"][1]


def test_obelics_as_published_becomes_shards_of_whole_pages(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    address = "https://a/b.png"
    (images / (hashlib.sha256(address.encode()).hexdigest() + ".png")).write_bytes(png("blue"))
    listed = [
        {"images": ["https://a/gone", None, address], "texts": [None, "words", None], "metadata": "[]"},
        {"images": ["https://a/gone", None], "texts": [None, "words"], "metadata": "[]"},
    ]
    write_table(tmp_path / "part.parquet", listed)
    said = run(
        "convert", "obelics", tmp_path / "part.parquet", tmp_path / "out", "--images", images, "--workers", 1
    )
    assert "1 samples in 1 shards of kind obelics" in said
    assert "1 x no image" in said
    assert captions(tmp_path / "out" / "*.tar", "obelics") == ["words"]
    page = json.loads(ShardSet(str(tmp_path / "out" / "*.tar")).read(0, 0)["json"])
    assert page == {"images": [None, address], "texts": ["words", None], "metadata": "[]"}


def test_pictures_inside_of_obelics_pages_are_kept_once_and_files_only_where_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.png").write_bytes(png())  # nobody named this folder
    inside = f"data:image/png;base64,{base64.b64encode(png('red')).decode()}"
    pictures = [{"bytes": png(), "path": None}, {"bytes": None, "path": "here.png"}]
    held = [{"images": [*pictures, None], "texts": [None, None, "x"]}]
    write_table(Path("held.parquet"), held)
    write_table(Path("text.jsonl"), [{"images": [inside, None], "texts": [None, "y"]}])
    for table in ("held.parquet", "text.jsonl"):
        assert "1 samples" in run("convert", "obelics", table, f"{table}.out", "--workers", 1)
    sample = ShardSet("held.parquet.out/*.tar").read(0, 0)
    assert sorted(sample) == ["0.png", "json"]
    assert json.loads(sample["json"]) == {"images": ["", None], "texts": [None, "x"]}
    sample = ShardSet("text.jsonl.out/*.tar").read(0, 0)
    assert b"base64" not in sample["json"]
    assert captions("text.jsonl.out/*.tar", "obelics") == ["y"]


def test_index_stores_an_index_beside_every_shard_and_names_bad_ones(folder, tmp_path):
    run("pack", folder, tmp_path / "out", "--samples-per-shard", 4, "--workers", 1)
    said = run("index", tmp_path / "out" / "*.tar", "--workers", 1)
    assert "3 shards with 10 samples are indexed" in said
    assert len(list((tmp_path / "out").glob("*.index.jsonl"))) == 3
    bad = tmp_path / "out" / "shard-000001.tar"
    bad.write_bytes(bad.read_bytes()[:5000])
    said = run("index", tmp_path / "out" / "*.tar", "--workers", 1, status=1)
    assert "2 shards with 6 samples" in said
    assert "shard-000001.tar" in said
    assert "not a sound tar" in said


@pytest.mark.slow
def test_ray_on_two_nodes_gives_the_same_bytes(folder, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    layout = FolderLayout(str(folder))
    make_shards([folder], tmp_path / "one", layout, name="s", samples=1, executor=ONE)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray = Executor("ray", address=cluster.address)
        made = make_shards([folder], tmp_path / "ray", layout, name="s", samples=1, executor=ray)
    finally:
        cluster.shutdown()
    assert not made.outcome.failures
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    shutil.rmtree(tmp_path / "ray")
