"""Vision transformers of open_clip: activation, norm and weights, against the library's own."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch

from flamingo import vision
from flamingo.config import FlamingoVisionConfig

TINY_CLIP: dict[str, Any] = {
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 1, "vocab_size": 64, "context_length": 8},
    "embed_dim": 16,
}
TRUNK = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "image_size": 160}
TINY_SIGLIP: dict[str, Any] = {**TINY_CLIP, "vision_cfg": TRUNK}


def activations(encoder) -> set[str]:
    return {type(block.mlp.gelu).__name__ for block in encoder.model.transformer.resblocks}


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("ViT-L-14/openai", "QuickGELU"),  # the architecture says GELU, the tag QuickGELU
        ("ViT-L-14/laion2b_s32b_b82k", "GELU"),
        ("ViT-L-14-quickgelu/openai", "QuickGELU"),
        ("ViT-L-14", "GELU"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "QuickGELU"),  # here the tag does not say it
    ],
)
def test_the_activation_is_the_one_that_the_weights_were_trained_with(name, activation):
    config = vision.source("open_clip").describe(name)
    assert config.options["quick_gelu"] is (activation == "QuickGELU")
    small = FlamingoVisionConfig(**{**config.to_dict(), "options": {**config.options, **TINY_CLIP}})
    assert activations(vision.build(small)) == {activation}


def test_nobody_is_told_of_random_weights_that_others_replace(caplog):
    with caplog.at_level("WARNING"):
        vision.build(vision.source("open_clip").describe("ViT-B-32", **TINY_CLIP))
        open_clip.create_model("ViT-B-32", **TINY_CLIP)
    said = [record.getMessage() for record in caplog.records if "No pretrained" in record.getMessage()]
    assert len(said) == 1  # that of the second


def test_the_activation_can_be_chosen():
    for quick, name in ((True, "QuickGELU"), (False, "GELU")):
        config = vision.source("open_clip").describe("ViT-L-14/openai", quick_gelu=quick, **TINY_CLIP)
        assert activations(vision.build(config)) == {name}


@pytest.fixture
def clip(tmp_path):
    """A CLIP of open_clip with QuickGELU, and the file of its weights."""
    torch.manual_seed(4)
    fields = {**TINY_CLIP, "vision_cfg": {**TINY_CLIP["vision_cfg"], "output_tokens": True}}
    model = open_clip.create_model("ViT-B-32", force_quick_gelu=True, **fields).eval()
    file = tmp_path / "weights.pt"
    torch.save(model.state_dict(), file)
    return model, f"ViT-B-32/{file}"


def test_weights_of_a_file_make_the_tokens_that_open_clip_makes(clip):
    """open_clip's own tokens come after the final norm."""
    model, name = clip
    source = vision.source("open_clip")
    pixels = torch.randn(2, 3, 32, 32)
    for final_norm in (False, True):
        config = source.describe(name, quick_gelu=True, final_norm=final_norm, **TINY_CLIP)
        encoder = vision.build(config)
        source.load(encoder, name)
        with torch.no_grad():
            tokens = encoder(pixels)
            _, expected = model.visual(pixels)
            assert torch.allclose(tokens, expected, atol=1e-5) == final_norm
            if not final_norm:
                torch.testing.assert_close(model.visual.ln_post(tokens), expected)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("ViT-L-14/no_such_tag", {}, r"ViT-L-14/no_such_tag.*neither a file nor.*openai"),
        ("ViT-L-14//no/such/file.pt", {}, r"/no/such/file\.pt"),
        ("no_such_net/openai", {}, r"no_such_net.*no such architecture.*ARCHITECTURE/PRETRAINED"),
        ("RN50/openai", {}, r"RN50/openai.*not a vision transformer"),
        ("coca_ViT-B-32", {"final_norm": True}, r"final_norm=True.*coca_ViT-B-32"),
    ],
)
def test_what_open_clip_cannot_do_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        vision.source("open_clip").describe(name, **fields)


def test_a_file_that_holds_no_such_weights_is_refused(clip, tmp_path):
    _, name = clip
    source = vision.source("open_clip")
    wider = {**TINY_CLIP, "vision_cfg": {**TINY_CLIP["vision_cfg"], "width": 48}}
    (tmp_path / "text.pt").write_text("no weights")
    for file, fields in ((name, wider), (f"ViT-B-32/{tmp_path / 'text.pt'}", TINY_CLIP)):
        encoder = vision.build(source.describe(file, **fields))
        with pytest.raises(ValueError, match="no weights could be read") as refused:
            source.load(encoder, file)
        assert file in str(refused.value)


def test_normalisation_is_that_of_the_weights():
    describe = vision.source("open_clip").describe
    assert list(describe("ViT-B-16-SigLIP/webli", **TINY_SIGLIP).mean) == [0.5] * 3
    assert list(describe("ViT-B-16-SigLIP", **TINY_SIGLIP).mean) == [0.5] * 3  # all its weights agree
    assert list(describe("ViT-B-32", **TINY_CLIP).mean) == list(open_clip.OPENAI_DATASET_MEAN)


def test_weights_of_open_clip_are_named_with_their_tag():
    source = vision.source("open_clip")
    with pytest.raises(ValueError, match="name the weights too"):
        source.load(torch.nn.Identity(), "ViT-B-32")
