"""Checkpoints are complete or absent, and damage is found before anything is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flamingo.data.writing import fingerprint
from flamingo.train import checkpoint

IDENTITY = {"seed": 0, "model": {"language": "a"}, "sources": [{"name": "x", "weight": 1.0}]}
FILES = {
    "rank-00000-000.safetensors": b"weights and moments" * 100,
    "rank-00001-000.safetensors": b"the other rank's" * 100,
}


def write(folder: Path, step: int, identity: dict = IDENTITY) -> Path:
    """A checkpoint as `Checkpoints` makes it, with other bytes in place of tensors."""
    target, part = folder / f"step-{step:06d}", folder / f".step-{step:06d}.part"
    part.mkdir(parents=True)
    for name, content in FILES.items():
        (part / name).write_bytes(content + str(step).encode())
        (part / f"{name[:10]}.json").write_text(json.dumps({name: fingerprint(part / name)}))
    manifest = {"format": checkpoint.FORMAT, "step": step, "identity": identity}
    checkpoint._rename(part, target, manifest)
    return target


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [alter, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_names_the_file(tmp_path, name, harm):
    path = write(tmp_path, 1)
    harm(path / name)
    assert name in str(checkpoint.damage(path))


def test_a_complete_checkpoint_is_undamaged_and_nothing_is_left_beside_it(tmp_path):
    path = write(tmp_path, 3)
    assert checkpoint.damage(path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["identity"] == IDENTITY
    assert sorted(manifest["files"]) == sorted(FILES)


@pytest.mark.parametrize("harm", [alter, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(tmp_path, name, harm):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    harm(bad / name)
    warnings: list[str] = []
    assert checkpoint.newest(tmp_path, IDENTITY, warnings.append) == good
    (warning,) = warnings
    assert "step-000002" in warning


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"files": []}', '{"files": {}}'])
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    path = write(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    assert checkpoint.damage(path)


def test_a_file_that_the_manifest_does_not_know_is_damage(tmp_path):
    path = write(tmp_path, 1)
    (path / "rank-00002-000.safetensors").write_bytes(b"from elsewhere")
    assert "rank-00002-000.safetensors" in str(checkpoint.damage(path))


@pytest.mark.parametrize("place", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_a_bit_of_the_manifest_that_flips_is_damage(tmp_path, place):
    path = write(tmp_path, 1) / "manifest.json"
    good = path.read_bytes()
    for bit in range(8):
        data = bytearray(good)
        data[int(place * len(good))] ^= 1 << bit
        path.write_bytes(bytes(data))
        assert checkpoint.damage(path.parent)


def test_the_newest_undamaged_one_is_taken_whatever_the_number_of_digits(tmp_path):
    for step in (9, 10, 999_999, 1_000_000):
        newest = write(tmp_path, step)
    assert checkpoint.newest(tmp_path, IDENTITY) == newest


def test_one_that_was_never_renamed_into_place_does_not_count(tmp_path):
    good = write(tmp_path, 1)
    part = tmp_path / ".step-000002.part"
    part.mkdir(parents=True)
    (part / "rank-00000-000.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path, IDENTITY) == good


def test_without_checkpoints_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path, IDENTITY) is None
    assert checkpoint.newest(tmp_path / "nowhere", IDENTITY) is None


def test_when_all_are_damaged_the_run_does_not_silently_start_again(tmp_path):
    for step in (1, 2):
        alter(write(tmp_path, step) / "rank-00001-000.safetensors")
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        checkpoint.newest(tmp_path, IDENTITY, lambda text: None)


def test_a_checkpoint_of_other_settings_is_refused_and_they_are_named(tmp_path):
    write(tmp_path, 1)
    other = {**IDENTITY, "seed": 7, "model": {"language": "b"}}
    with pytest.raises(ValueError, match=r"model.language was 'a', is 'b'; seed was 0, is 7"):
        checkpoint.newest(tmp_path, other)


@pytest.mark.parametrize(
    ("new", "named"),
    [
        (IDENTITY, []),
        ({**IDENTITY, "seed": 1}, ["seed was 0, is 1"]),
        ({**IDENTITY, "model": {"language": "b"}}, ["model.language was 'a', is 'b'"]),
        ({**IDENTITY, "model": {}}, ["model.language was 'a', is None"]),
        (
            {**IDENTITY, "model": {"language": "a", "vision": "v"}},
            ["model.vision was None, is 'v'"],
        ),
    ],
)
def test_differences_are_named_by_their_key(new, named):
    assert checkpoint.differences(IDENTITY, new) == named


def test_a_changed_source_is_a_difference():
    other = {**IDENTITY, "sources": [{"name": "x", "weight": 2.0}]}
    (difference,) = checkpoint.differences(IDENTITY, other)
    assert "sources" in difference and "2.0" in difference


def test_writing_a_step_again_replaces_a_damaged_attempt(tmp_path):
    alter(write(tmp_path, 1) / "rank-00001-000.safetensors")
    assert checkpoint.damage(write(tmp_path, 1)) is None


def test_what_a_user_laid_beside_checkpoints_is_none(tmp_path):
    good = write(tmp_path, 1)
    (tmp_path / "step-000001.bak").mkdir()
    (tmp_path / "step-last").mkdir()
    assert checkpoint.complete(tmp_path) == [good] and checkpoint.newest(tmp_path, IDENTITY) == good


def test_a_file_that_cannot_be_read_is_damage_too(tmp_path, monkeypatch):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)

    def reading(path: Path) -> str:
        if path.parent == bad:
            raise OSError(5, "Input/output error")
        return fingerprint(path)

    monkeypatch.setattr(checkpoint, "fingerprint", reading)
    warnings: list[str] = []
    assert checkpoint.newest(tmp_path, IDENTITY, warnings.append) == good
    assert "step-000002" in warnings[0] and "cannot be read ([Errno 5]" in warnings[0]


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def removing(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", removing)
    checkpoint._remove(tmp_path / "step-000001")
    assert "step-000001 is not needed any more and cannot be removed: " in capsys.readouterr().err
