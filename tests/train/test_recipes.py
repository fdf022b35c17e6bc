"""Every recipe of train/recipes builds the model that it says, on the meta device.

One that is added to the folder fails here until its numbers of parameters stand below.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from flamingo.runtime import dtype_of
from flamingo.train.config import read_recipe
from flamingo.train.plan import GIB, plan
from flamingo.train.planning.assembly import assemble, bytes_of, parameters
from flamingo.train.planning.memory import states
from flamingo.train.planning.show import show
from tests.train.backbones import known_backbones

ROOT = Path(__file__).resolve().parents[2]
FOLDER, PAGE = ROOT / "train" / "recipes", ROOT / "docs" / "recipes.md"
# Parameters: (frozen LM, frozen encoder, trained).
SIZES = {
    "finetune-folder-lora": (1_720_574_976, 85_843_200, 291_478_542),
    "idefics-9b-like": (6_738_415_616, 632_076_800, 1_560_497_936),
    "llava-like-stage1": (6_738_415_616, 290_909_184, 20_996_096),
    "llava-like-stage2": (0, 290_909_184, 6_759_411_712),
    "openflamingo-3b": (1_311_344_640, 303_966_208, 944_027_696),
    "openflamingo-4b": (2_775_864_320, 303_966_208, 960_774_176),
    "openflamingo-9b": (6_649_286_656, 303_966_208, 1_178_851_344),
    "quickstart": (134_515_008, 3_371_008, 21_626_124),
    "qwen3-0.6b-siglip2": (596_049_920, 85_843_200, 109_425_166),
    "qwen3-8b-siglip2": (8_190_735_360, 412_987_248, 1_334_463_250),
    "resnet-gpt2": (124_439_808, 23_508_032, 1_580_800),
}
# GB of the trained part in float32 that OpenFlamingo publishes: its files hold the LM's whole tables,
# of which it trains the rows of the added tokens.
PUBLISHED = {"3b": 4.2, "4b": 4.9, "9b": 5.5}


@pytest.fixture(autouse=True)
def _backbones(monkeypatch):
    known_backbones(monkeypatch)


def overrides(path: Path) -> list[str]:
    """The quickstart's encoder is a folder that its own command fills; its name is timm's. The model that
    stage 2 begins with is not there: its architecture stands in the recipe too."""
    known = {"quickstart": ["model.vision=timm:tf_efficientnet_lite0"]}
    return known.get(path.stem, ["model.start=null"] if path.stem == "llava-like-stage2" else [])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_builds_the_model_that_it_says(path):
    recipe = read_recipe(path, overrides(path))
    model = assemble(recipe)
    assert all(parameter.is_meta for parameter in model.parameters())
    frozen, trained = parameters(model)
    found = (frozen.get("language_model", 0), frozen["vision_encoder"], sum(trained.values()))
    assert found == SIZES[path.stem]
    frozen_bytes = dtype_of(recipe.model.frozen_dtype).itemsize * sum(found[:2])
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert bytes_of(model, trained=False) == frozen_bytes + buffers
    assert bytes_of(model, trained=True) == 4 * found[2]  # trained weights are float32


@pytest.mark.parametrize("size", PUBLISHED)
def test_openflamingos_are_as_large_as_published(size):
    recipe = read_recipe(FOLDER / f"openflamingo-{size}.yaml", ["unfreeze=[{part: embeddings}]"])
    assert bytes_of(assemble(recipe), trained=True) / 1e9 == pytest.approx(PUBLISHED[size], abs=0.05)


def test_every_number_of_the_list_has_its_recipe():
    assert set(SIZES) == {path.stem for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_where_its_numbers_come_from(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert re.search(r"et al\. \d{4}", text), "no source is named"
    assert "our choice" in text.lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus", "memory"),
    [
        ("openflamingo-3b", 64, 80),
        ("openflamingo-4b", 64, 80),
        ("openflamingo-9b", 64, 80),
        ("idefics-9b-like", 128, 80),
        ("qwen3-0.6b-siglip2", 8, 80),
        ("qwen3-8b-siglip2", 32, 80),
        ("finetune-folder-lora", 1, 24),
        ("llava-like-stage1", 8, 80),
        ("llava-like-stage2", 8, 80),
    ],
)
def test_a_recipe_is_set_as_the_plan_for_its_machine_recommends(name, gpus, memory):
    path = FOLDER / f"{name}.yaml"
    recipe = read_recipe(path, overrides(path))
    made = plan(recipe, gpus=gpus, gpu_memory=memory)
    best = made.recommended
    assert best and (best.zero_stage, best.accumulation) == (recipe.zero_stage, recipe.accumulation)
    if name == "openflamingo-9b":
        show(made, told := io.StringIO())
        assert rows(told.getvalue()) == rows(PAGE.read_text())


def rows(text: str) -> list[list[str]]:
    """Of a plan's table."""
    return [line.split() for line in text.splitlines() if re.match(r"   [0-3] +\d+ ", line)]


def test_the_page_shows_the_states_that_a_plan_gives():
    recipe = read_recipe(FOLDER / "openflamingo-9b.yaml")
    model = assemble(recipe)
    count, whole = sum(parameters(model)[1].values()), bytes_of(model.vision_encoder, trained=False)
    shown = rows(PAGE.read_text())
    assert len(shown) == 20
    for row in shown:
        stage, accumulation = map(int, row[:2])
        found = states(recipe, stage, 64, accumulation, bytes_of(model, trained=False), count, whole)
        kinds = (found.frozen, found.trained, found.gradients, found.optimizer, found.buffers)
        assert row[3:8] == [f"{kind / GIB:.2f}" for kind in kinds]
        batch = float(row[8]) + float(row[9])
        assert float(row[10]) == pytest.approx(found.total / GIB + batch, abs=0.016)  # three were rounded


def test_the_stages_of_llava_are_of_one_architecture_and_the_first_trains_no_language_model():
    first, second = (
        read_recipe(path, overrides(path)) for path in (FOLDER / f"llava-like-stage{n}.yaml" for n in (1, 2))
    )
    assert first.model.architecture == second.model.architecture
    assert first.model.vision_options == second.model.vision_options
    assert read_recipe(FOLDER / "llava-like-stage2.yaml").model.start == f"{first.run}/model"
    assert set(parameters(assemble(first))[1]) == {"resampler", "embeddings"}
    adapters = ["unfreeze=[]", "lora={rank: 128, alpha: 256}", "model.start=null"]
    assert set(parameters(assemble(read_recipe(FOLDER / "llava-like-stage2.yaml", adapters)))[1]) == {
        "resampler", "embeddings", "lora"
    }  # fmt: skip
