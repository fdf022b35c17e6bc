"""Recipes: YAML plus key=value; what cannot be used is named with what could."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flamingo.train.config import Recipe, read_recipe


def test_a_recipe_is_read_with_the_defaults_of_what_it_leaves_out(recipe_file):
    recipe = read_recipe(recipe_file)
    assert recipe.run == Path("runs/tiny") and recipe.steps == 100
    assert [source.name for source in recipe.sources] == ["captions", "turns"]
    assert recipe.optimizer.lr == 1e-4 and recipe.model.frozen_dtype == "auto"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("steps=7", lambda r: r.steps == 7),
        ("run=elsewhere/tiny", lambda r: r.run == Path("elsewhere/tiny")),
        # YAML 1.1 takes these for text
        ("optimizer.lr=1e-4", lambda r: r.optimizer.lr == 1e-4),
        ("optimizer.lr=3E-3", lambda r: r.optimizer.lr == 3e-3),
        ("optimizer.lr=1.5e-4", lambda r: r.optimizer.lr == 1.5e-4),
        ("model.architecture.gate_init=1e-2", lambda r: r.model.architecture["gate_init"] == 0.01),
        # a section that the file does not have
        ("optimizer.schedule=cosine", lambda r: r.optimizer.schedule == "cosine"),
        ("optimizer.betas=[0.8, 0.9]", lambda r: r.optimizer.betas == (0.8, 0.9)),
        # a new key of a free section, and what was there stays
        (
            "model.architecture.resampler_depth=2",
            lambda r: r.model.architecture == {"gate_init": 0.5, "resampler_depth": 2},
        ),
        # sources by name
        ("sources.turns.weight=0.2", lambda r: [s.weight for s in r.sources] == [1.0, 0.2]),
        (
            "sources.captions.shards=c-{0..3}.tar",
            lambda r: [s.shards for s in r.sources] == ["c-{0..3}.tar", "b.tar"],
        ),
        # a value may hold what separates
        ("sources.turns.shards=s=1/x.tar", lambda r: r.sources[1].shards == "s=1/x.tar"),
        # a number where a path is meant
        ("run=2024", lambda r: r.run == Path("2024")),
    ],
)
def test_overrides_change_what_they_name(recipe_file, override, read):
    assert read(read_recipe(recipe_file, [override]))


def test_the_last_override_wins(recipe_file):
    assert read_recipe(recipe_file, ["steps=1", "steps=2"]).steps == 2


def test_numbers_in_the_file_may_be_written_like_1e_4(recipe_file):
    fields = recipe_file.read_text() + "optimizer:\n  lr: 1e-4\n"
    recipe_file.write_text(fields.replace("gate_init: 0.5", "gate_init: 1e-1"))
    recipe = read_recipe(recipe_file)
    assert recipe.optimizer.lr == 1e-4
    assert recipe.model.architecture == {"gate_init": 0.1}


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("stesp=1", "stesp", "steps"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", "known: .*lr"),
        ("optimizer.warmup=1", "optimizer.warmup", "warmup_steps"),
        ("model.langauge=x", "model.langauge", "language"),
        ("sources.turns.max_token=3", "sources.turns.max_token", "max_tokens"),
        ("optimiser.lr=1", "optimiser", "optimizer"),
        ("seed.x=1", "seed", "."),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(recipe_file, override, key, near):
    with pytest.raises(ValueError, match=f"{key}.*{near}") as error:
        read_recipe(recipe_file, [override])
    assert "Traceback" not in str(error.value) and "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "'steps'.*key=value"),
        ("=3", "'=3'.*key=value"),
        ("steps=many", "steps.*integer.*'many'"),
        ("steps=0", "steps.*1.*0"),
        ("optimizer.lr=-1", "optimizer.lr.*greater than 0"),
        ("optimizer.schedule=steps", "optimizer.schedule.*'constant'.*'steps'"),
        ("sources.turn.weight=1", "'turn'.*captions.*turns"),
        ("sources.turns.weight=-1", r"sources\.turns\.weight: .*greater than 0 .*got -1"),
        ("sources=[{name: turns, kind: pairs}]", r"sources\.turns\.shards: .*required"),
        ("sources=[{kind: pairs}]", r"sources\.0\.name: .*required"),  # it has no name
        ("sources=[3]", r"sources\.0: .*got 3"),
        ("sources.weight=1", "sources.*list.*sources.NAME.weight"),
        ("sources.captions.name=turns", "names must differ"),
        ("sources=[]", "sources.*at least 1"),
        (
            "sources=[{name: late, kind: pairs, shards: a.tar, batch: 4, max_tokens: 9, start: 2}]",
            "none begins before step 2.*start",
        ),
        ("model.vision.x=1", "vision holds one value"),
        ("optimizer.betas=[0.9", "optimizer.betas"),  # not YAML
        ("optimizer.betas=[2, 3]", "optimizer.betas.*less than 1"),
        ("optimizer.betas=[.nan, 0.9]", "optimizer.betas.*finite"),
        ("optimizer.lr=.inf", "optimizer.lr.*finite"),
        ("z_loss=.inf", "z_loss.*finite"),
        ("optimizer.lr_factors={gates: .inf}", "optimizer.lr_factors.*finite"),
        ("seed=99999999999999999999999", "seed.*less than"),
        ("seed=-1", "seed.*greater than or equal to 0"),
        ("run=@home", "run"),
        ("run=", "run"),  # no folder named None
        ("sources.turns.kind=interleave", "interleaved"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(recipe_file, override, words):
    with pytest.raises(ValueError, match=words):
        read_recipe(recipe_file, [override])


def test_a_recipe_that_is_not_there_names_those_of_its_folder(recipe_file):
    with pytest.raises(ValueError, match=r"tyni\.yaml is not there.*tiny\.yaml"):
        read_recipe(recipe_file.with_name("tyni.yaml"))
    with pytest.raises(ValueError, match="is not there"):
        read_recipe(recipe_file.parent / "nowhere" / "tiny.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "a: [1,", "steps: 1\nsteps"])
def test_a_file_that_holds_no_recipe_is_named(recipe_file, text):
    recipe_file.write_text(text)
    with pytest.raises(ValueError, match=r"tiny\.yaml"):
        read_recipe(recipe_file)


def test_a_file_that_is_no_text_is_named(recipe_file):
    recipe_file.write_bytes(b"\xff\x00\x81")
    with pytest.raises(ValueError, match=r"tiny\.yaml is not text in UTF-8"):
        read_recipe(recipe_file)


def test_a_written_recipe_is_read_again_the_same(recipe_file, tmp_path):
    """As a run's folder keeps it."""
    recipe = read_recipe(recipe_file, ["optimizer.lr=3e-4", "sources.turns.weight=0.2"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    assert read_recipe(copy) == recipe


def test_where_a_run_lies_and_how_often_it_reports_is_not_its_identity(recipe_file):
    recipe = read_recipe(recipe_file)
    free = ["run=b", "workers=3", "log_every=9", "blank_every=3", "checkpoint_every=7"]
    assert read_recipe(recipe_file, free).identity() == recipe.identity()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "steps=99",
        "optimizer.lr=1e-5",
        "model.language=other",
        "model.architecture.gate_init=0.1",
        "sources.turns.weight=0.5",
        "sources.turns.batch=8",
        # the result of a step depends on it, if only in its last bits
        "autocast=float32",
    ],
)
def test_what_a_resumed_run_must_share_is_its_identity(recipe_file, override):
    recipe = read_recipe(recipe_file)
    assert read_recipe(recipe_file, [override]).identity() != recipe.identity()


@pytest.mark.parametrize("path", sorted(Path("train/recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_that_we_ship_can_be_read(path):
    assert isinstance(read_recipe(path), Recipe)
