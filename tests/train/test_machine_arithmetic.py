"""`auto`: bfloat16 where the machine has its products, else float32; alike on all ranks, all of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flamingo import folders, runtime
from flamingo.train import opening
from flamingo.train.config import Recipe
from flamingo.train.opening import check_folder, settled, slow_arithmetic
from flamingo.train.plan import plan
from tests.model.conftest import config, text_config
from tests.train.ranks import in_ranks
from tests.train.test_plan import IMAGES, LANGUAGE, recipe_for

MODERN = {"avx512_bf16": True, "amx_bf16": False, "architecture": "x86_64"}
OLD = {"avx512_bf16": False, "amx_bf16": False, "avx2": True, "architecture": "x86_64"}


def recipe(run: Path, autocast: str = "auto", frozen: str = "auto") -> Recipe:
    model = {"vision": "timm:test_vit", "language": "lm", "frozen_dtype": frozen}
    sources = [{"name": "pairs", "kind": "pairs", "shards": "a.tar", "batch": 4, "max_tokens": 32}]
    return Recipe.model_validate(
        {"run": str(run), "steps": 8, "model": model, "sources": sources, "autocast": autocast}
    )


def arithmetic(given: Recipe) -> tuple[str, str]:
    return given.autocast, given.model.frozen_dtype


@pytest.mark.parametrize(
    ("has", "cuda", "expected"),
    [
        (MODERN, False, "bfloat16"),
        ({**OLD, "amx_bf16": True}, False, "bfloat16"),
        ({"architecture": "aarch64", "bf16": True}, False, "bfloat16"),
        ({"architecture": "aarch64", "bf16": False}, False, "float32"),
        (OLD, False, "float32"),
        (OLD, True, "bfloat16"),
    ],
)
def test_bfloat16_is_for_machines_that_have_its_products(monkeypatch, has, cuda, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert runtime.arithmetic() == expected
    assert runtime.dtype_of("auto") == getattr(torch, expected)
    assert runtime.dtype_of("float16") == torch.float16


def settle(folder: str, *of_ranks: str) -> Any:
    """What a recipe that leaves it to the machines becomes, on ranks whose machines differ."""
    opening.arithmetic = lambda: of_ranks[torch.distributed.get_rank()]
    rank = torch.distributed.get_rank()
    free, given = (settled(recipe(Path(folder), *own), rank) for own in ((), ("float16", "bfloat16")))
    return arithmetic(free), arithmetic(given)


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [(("bfloat16", "bfloat16"), "bfloat16"), (("bfloat16", "float32"), "float32")],
)
def test_all_ranks_compute_as_the_slowest_machine_can(tmp_path, of_ranks, expected):
    for free, given in in_ranks(2, tmp_path / "ranks", settle, str(tmp_path / "run"), *of_ranks):
        assert free == (expected, expected)
        assert given == ("float16", "bfloat16")  # who asks gets it


def test_a_run_goes_on_in_the_arithmetic_that_it_began_with(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    held = recipe(run, "bfloat16", "float32").model_dump(mode="json")
    (run / "recipe.yaml").write_text(yaml.safe_dump(held))
    for free, _ in in_ranks(2, tmp_path / "ranks", settle, str(run), "float32", "float32"):
        assert free == ("bfloat16", "float32")
    check_folder(recipe(run), resume=True)
    with pytest.raises(ValueError, match="other settings.*autocast"):
        check_folder(recipe(run, "float32"), resume=True)


@pytest.mark.parametrize(("autocast", "frozen"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_whoever_asks_for_products_that_are_slow_here_is_told(tmp_path, monkeypatch, autocast, frozen):
    given = recipe(tmp_path, autocast, frozen)
    monkeypatch.setattr(opening, "arithmetic", lambda: "float32")
    assert "autocast=float32" in (slow_arithmetic(given) or "")
    assert slow_arithmetic(recipe(tmp_path, "float32", "float32")) is None
    monkeypatch.setattr(opening, "arithmetic", lambda: "bfloat16")
    assert slow_arithmetic(given) is None


def test_a_plan_for_gpus_does_not_ask_the_processor_that_it_is_made_on(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LANGUAGE))
    monkeypatch.setattr(runtime, "arithmetic", lambda: "float32")
    recipes = [
        recipe_for(tmp_path, autocast=dtype, model={"frozen_dtype": dtype})
        for dtype in ("auto", "bfloat16", "float32")
    ]
    found = [plan(each, gpus=1, gpu_memory=8, images=IMAGES) for each in recipes]
    assert found[0].as_json() == found[1].as_json() != found[2].as_json()


@pytest.mark.parametrize(
    ("machine", "asked", "expected"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
    ],
)
def test_a_stored_model_answers_in_what_is_fast_here(tmp_path, monkeypatch, machine, asked, expected):
    made = folders.FlamingoForConditionalGeneration(config(text_config())).to(torch.bfloat16)  # type: ignore[arg-type]
    made.save_pretrained(tmp_path)
    monkeypatch.setattr(folders, "arithmetic", lambda: machine)
    model = folders.load_model(tmp_path, torch.device("cpu"), asked)
    assert {p.dtype for p in model.parameters()} == {expected} and not model.training
    for name, weight in made.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), weight.float()), name
