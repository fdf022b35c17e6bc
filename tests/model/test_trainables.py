"""The trained part alone: small, complete, and refused where it does not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from flamingo.checkpoints.trainables import load_trainables, save_trainables, trained_state


def test_the_file_is_hardly_larger_than_what_it_holds(build, tmp_path):
    """The figure is for models of use: the header of this tiny one is subtracted."""
    model = build(resampler_width=256, cross_attention_head_dim=64, cross_attention_ff_mult=16.0)
    size = save_trainables(model, tmp_path / "trained.safetensors")
    held = sum(t.numel() * t.element_size() for t in trained_state(model).values())
    header = int.from_bytes((tmp_path / "trained.safetensors").read_bytes()[:8], "little")
    assert size == 8 + header + held
    assert header < 12_000  # names and config: a thousandth of a model of 12 MB


def test_what_was_trained_comes_back_and_the_frozen_part_is_untouched(build, ids, pixels, tmp_path):
    model = build()
    with torch.no_grad():
        for parameter in trained_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_trainables(model, tmp_path / "t.safetensors")
    fresh = build()
    load_trainables(fresh, tmp_path / "t.safetensors")
    with torch.no_grad():
        a, b = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, fresh))
    assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cross_attention_every": 1}, "another architecture; missing .*gated_blocks"),
        ({"resampler_latents": 5}, r"resampler.latents is \[3, 16\], the model has \[5, 16\]"),
    ],
)
def test_a_file_for_another_architecture_is_refused(build, tmp_path, fields, words):
    save_trainables(build(), tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=words):
        load_trainables(build(**fields), tmp_path / "t.safetensors")


def test_files_of_others_are_refused(build, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="not written by `flamingo export`"):
        load_trainables(build(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_trainables(build(), tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_trainables(build(), tmp_path / "absent.safetensors")


def test_a_folder_is_not_written_over_by_a_file(build, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        ValueError, match=r"mine: is a folder; name a file in it, e\.g\. .*trained\.safetensors"
    ):
        save_trainables(build(), tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
