"""What a run does with stored features, bad samples and shards that change, through the launcher."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from flamingo.data.tools.executors import Executor
from flamingo.features import write_features


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_from_stored_features_equals_training_from_pixels(world: Path, tmp_path: Path, cli):
    vision, language = f"timm:{world / 'vision'}", world / "language"
    options = ("--vision", vision, "--language", language, "--dtype", "float32", "cross_attention_every=1")
    assert cli("create", tmp_path / "model", *options).returncode == 0
    shards = world / "shards"
    folder = tmp_path / "features"
    for kind, pattern, out in (("pairs", "pairs", "a"), ("interleaved", "documents", "b")):
        done = cli(
            "data", "features", shards / f"{pattern}-*.tar", "--kind", kind,
            "--model", tmp_path / "model", "--out", folder / out,
        )  # fmt: skip
        assert done.returncode == 0 and "0 bad samples" in done.stdout, done.stdout + done.stderr
    pairs, model = [str(shards / "pairs-*.tar")], tmp_path / "model"
    for part in ("2/2", "1/2"):  # a job array; the command above ran local processes
        assert not (folder / "parts" / "features.json").exists()
        write_features(model, pairs, "pairs", {}, folder / "parts", Executor(workers=1, part=part))
    for path in (folder / "a").glob("[a-z]*.*"):
        assert (folder / "parts" / path.name).read_bytes() == path.read_bytes()
    exact = (
        "model.frozen_dtype=float32",
        "autocast=float32",
        "feature_cache_gb=0",
        "blank_every=0",
        "steps=2",
    )
    losses = []
    for name, extra in (
        ("pixels", ()),
        ("stored", (f"features=[{folder / 'a'}, {folder / 'b'}]", "workers=1")),
    ):
        run = tmp_path / name
        done = cli("train", world / "recipe.yaml", f"run={run}", *exact, *extra, "--processes", "1")
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append([record["loss"] for record in records(run)])
    for pixels, stored in zip(*losses, strict=True):
        assert stored == pytest.approx(pixels, abs=1e-4)
    other = ("model.frozen_dtype=bfloat16", f"features={folder / 'a'}", f"run={tmp_path / 'other'}")
    done = cli("train", world / "recipe.yaml", *other, "--processes", "1")
    assert done.returncode == 1 and "another encoder (dtype 'float32', not 'bfloat16'" in done.stderr


def damage(path: Path, count: int) -> None:
    """Cut the pictures of so many samples short; keys and members stay."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    left = count
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            if name.endswith(".png") and left:
                data, left = data[:40], left - 1
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_bad_samples_are_listed_and_too_many_stop_all_ranks(world: Path, tmp_path: Path, cli):
    shards = tmp_path / "shards"
    shutil.copytree(world / "shards", shards)
    pairs = sorted(shards.glob("pairs-*.tar"))[0]
    damage(pairs, 10)
    run = tmp_path / "run"
    arguments = (
        "train", world / "recipe.yaml", f"run={run}", f"sources.captions.shards={shards}/pairs-*.tar",
        "sources.captions.batch=8", "blank_every=0", "--processes", "2",
    )  # fmt: skip
    done = cli(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert {bad["fault"] for bad in listed} == {"damaged image"}
    assert sum(record["skipped"] for record in records(run)) == len(listed) > 0
    assert sum(sum(r.get("faults", {}).values()) for r in records(run)) == len(listed)
    done = cli(*arguments, f"run={tmp_path / 'strict'}", "max_bad_samples=0")
    assert done.returncode != 0 and "max_bad_samples=0" in done.stderr and "pairs-0" in done.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_other_shards_only_when_told(world: Path, trained: Path, tmp_path: Path, cli):
    shards, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(world / "shards", shards)
    first = (
        "train", world / "recipe.yaml", f"run={run}", f"sources.captions.shards={shards}/pairs-*.tar",
        "blank_every=0", "--processes", "1",
    )  # fmt: skip
    assert cli(*first).returncode == 0
    shutil.rmtree(run / "checkpoints" / "step-000004")
    added = shards / "pairs-000009.tar"
    shutil.copy(sorted(shards.glob("pairs-*.tar"))[0], added)
    done = cli(*first, "--resume", "log_every=2")
    assert done.returncode != 0 and "shard pairs-000009.tar of source 'captions' was added" in done.stderr
    assert not (run / "changes.jsonl").exists()  # it did not go on with another setting
    done = cli(*first, "--resume", "--accept-changed-shards")
    assert done.returncode == 0, done.stdout + done.stderr
