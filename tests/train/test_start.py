"""A run that begins with a trained model: its weights, frozen ones too, and its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo.checkpoints.trainables import save_trainables, trained_state
from flamingo.folders import assemble as write_model
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train.config import Recipe
from flamingo.train.export import assemble
from flamingo.train.planning import assembly
from tests.docs.backbones import write_backbones

SMALL = ["resampler_depth=1", "resampler_width=16", "resampler_latents=3", "cross_attention_every=1"]
SMALL += ["cross_attention_heads=2", "cross_attention_head_dim=8", "gate_init=0.5"]


@dataclass(frozen=True)
class Trained:
    folder: Path
    vision: Path
    language: Path

    def recipe(self, start: Path, **fields: Any) -> Recipe:
        """fields: of the section `model`, or of the recipe."""
        names = ("architecture", "language")
        inside = {name: fields.pop(name) for name in names if name in fields}
        model = {"vision": f"timm:{self.vision}", "language": str(self.language), "frozen_dtype": "float32"}
        source = {"name": "a", "kind": "pairs", "shards": "a.tar", "batch": 2, "max_tokens": 16}
        model |= {"start": str(start), **inside}
        return Recipe(**{"run": "runs/new", "steps": 1, "model": model, "sources": [source], **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model whose every weight has moved, as after a training with adapters that were merged."""
    folder = tmp_path_factory.mktemp("start")
    vision, language = write_backbones(folder / "backbones")
    write_model(folder / "model", f"timm:{vision}", str(language), SMALL, "float32")
    model: Any = FlamingoForConditionalGeneration.from_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    return Trained(folder / "model", vision, language)


def test_a_folder_gives_all_weights_and_the_architecture(trained: Trained):
    made, processor = assemble(trained.recipe(trained.folder))
    held: Any = FlamingoForConditionalGeneration.from_pretrained(trained.folder)
    assert made.config.resampler_latents == 3
    assert made.config.cross_attention_scale == held.config.cross_attention_scale
    own = made.state_dict()
    assert all(torch.equal(own[name], value) for name, value in held.state_dict().items())
    ids = processor.tokenizer("<image>Question: what", return_tensors="pt")["input_ids"]
    vision: Any = made.config.vision_config
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    with torch.no_grad():
        one, other = (m.eval()(input_ids=ids, pixel_values=pixels).logits for m in (made, held))
    assert torch.equal(one, other)


def test_adapters_come_on_top(trained: Trained):
    made, _ = assemble(trained.recipe(trained.folder, lora={"rank": 2}))
    assert [name for name in trained_state(made) if "lora_" in name]
    assert made.gated_blocks[0].attn_gate.item() != 0.5


def test_a_file_gives_what_was_trained(trained: Trained, tmp_path: Path):
    held: Any = FlamingoForConditionalGeneration.from_pretrained(trained.folder)
    save_trainables(held, tmp_path / "t.safetensors")
    made, _ = assemble(trained.recipe(tmp_path / "t.safetensors"))
    own = trained_state(made)
    assert own and all(torch.equal(own[name], value) for name, value in trained_state(held).items())
    frozen = "language_model.model.embed_tokens.weight"
    assert not torch.equal(made.state_dict()[frozen], held.state_dict()[frozen])


def test_a_plan_knows_the_architecture_too(trained: Trained):
    recipe = trained.recipe(trained.folder)
    planned = trained_state(assembly.assemble(recipe))
    assert {n: p.shape for n, p in planned.items()} == {
        n: p.shape for n, p in trained_state(assemble(recipe)[0]).items()
    }


def test_what_does_not_fit_is_refused_with_names(trained: Trained, tmp_path: Path):
    changed = trained.recipe(trained.folder, architecture={"resampler_latents": 5})
    with pytest.raises(
        ValueError, match=r"another encoder, language model or architecture.*resampler.latents"
    ):
        assemble(changed)
    _, wider = write_backbones(tmp_path / "wider", width=64)
    with pytest.raises(ValueError, match=r"another encoder, language model or architecture"):
        assemble(trained.recipe(trained.folder, language=str(wider)))
    with pytest.raises(ValueError, match=r"nowhere is not there: name a model folder"):
        assemble(trained.recipe(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds no model \(no config.json\)"):
        assemble(trained.recipe(tmp_path))
    with pytest.raises(ValueError, match=r"model.start=.*zero_stage=3.*set zero_stage to 2"):
        trained.recipe(trained.folder, zero_stage=3)
