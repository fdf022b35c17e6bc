"""Shots and prompts: functions of the setting and the query alone, and never the query itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Setting, blanked, build, choose_shots, limited, shuffled
from flamingo.eval.run import together

BENCHMARK = SimpleNamespace(
    prompt=lambda e: f"Q: {e.question} A:", completion=lambda e: f" {e.answers[0]}", tidy=str.strip
)
POOL = [Example(f"d{i}", Path(f"{i}.png"), f"what {i}?", (f"a{i}",)) for i in range(40)]
QUERY = Example("q", Path("q.png"), "what?", ("yes",))


def test_shots_are_a_function_of_seed_and_query():
    first, again = (choose_shots(POOL, QUERY, Setting(8, seed=3)) for _ in range(2))
    assert first == again and len({shot.id for shot in first}) == 8
    other_seed = choose_shots(POOL, QUERY, Setting(8, seed=4))
    other_query = choose_shots(POOL, Example("r", Path("r.png")), Setting(8, seed=3))
    assert first != other_seed and first != other_query


def test_fixed_shots_are_the_same_for_all_queries_and_others_for_another_seed():
    chosen = [
        choose_shots(POOL, Example(n, Path(n)), Setting(4, source="fixed", seed=seed))
        for seed, n in ((0, "a"), (0, "b"), (1, "a"))
    ]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("source", ["random", "fixed"])
def test_a_shot_is_never_the_query_nor_its_picture(source):
    pool = [*POOL[:6], *(Example(f"same{i}", QUERY.image, "other?", ("no",)) for i in range(6)), QUERY]
    for seed in range(20):
        shots = choose_shots(pool, QUERY, Setting(6, source=source, seed=seed))
        assert all(shot.image != QUERY.image for shot in shots) and len(shots) == 6


def test_the_most_similar_shot_stands_next_to_the_query():
    nearest = [Example("self", QUERY.image), *POOL]
    shots = choose_shots(POOL, QUERY, Setting(3, source="similar"), {"q": nearest})
    assert [shot.id for shot in shots] == ["d2", "d1", "d0"]


def test_more_shots_than_demonstrations_are_refused():
    with pytest.raises(ValueError, match="shots=8: only 5"):
        choose_shots(POOL[:5], QUERY, Setting(8))


def test_a_prompt_is_turns_that_end_as_in_training():
    prompt = build(BENCHMARK, QUERY, POOL[:2], Setting(2))  # type: ignore[arg-type]
    assert prompt.prefix == (
        "<image>Q: what 0? A: a0<|endofchunk|><image>Q: what 1? A: a1<|endofchunk|>"
    ) and prompt.prefix_images == (Path("0.png"), Path("1.png"))
    assert (prompt.text, prompt.images) == ("<image>Q: what? A:", (Path("q.png"),))
    assert blanked(prompt).images == (None,) and blanked(prompt).prefix_images == prompt.prefix_images


def test_controls_change_pictures_and_leave_texts():
    plain = build(BENCHMARK, QUERY, POOL[:3], Setting(3))  # type: ignore[arg-type]
    blank, text, other = (
        build(BENCHMARK, QUERY, POOL[:3], Setting(3, control))  # type: ignore[arg-type]
        for control in ("blank", "text_only_shots", "shuffled_shots")
    )
    assert blank.prefix == plain.prefix and set(blank.prefix_images + blank.images) == {None}
    assert text.prefix == plain.prefix.replace("<image>", "") and text.prefix_images == ()
    assert text.images == plain.images
    assert other.prefix == plain.prefix and sorted(other.prefix_images) == sorted(plain.prefix_images)
    assert all(a != b for a, b in zip(other.prefix_images, plain.prefix_images, strict=True))


def test_zero_shots_as_in_the_papers_are_two_without_pictures():
    setting = Setting(0, text_shots=True)
    prompt = build(BENCHMARK, QUERY, choose_shots(POOL, QUERY, setting), setting)  # type: ignore[arg-type]
    assert prompt.prefix.count("<|endofchunk|>") == 2 and "<image>" not in prompt.prefix
    assert prompt.prefix_images == () and choose_shots(POOL, QUERY, Setting(0)) == []


def test_a_sample_depends_on_the_seed_alone():
    assert limited(POOL, 5, 1) == limited(POOL, 5, 1) != limited(POOL, 5, 2)
    assert limited(POOL, None) == limited(POOL, 99) == POOL


def test_orders_of_an_ensemble_are_the_shots_in_other_orders():
    orders = [shuffled(POOL[:8], number, QUERY) for number in range(3)]
    assert orders[0] == POOL[:8] and orders[1] != orders[0] != orders[2] != orders[1]
    assert all(sorted(o, key=lambda e: e.id) == sorted(POOL[:8], key=lambda e: e.id) for o in orders)


def test_answers_of_several_orders_are_put_together():
    said = [(Prediction("q", text), raw) for text, raw in (("a", "a!"), ("b", "b!"), ("b", "b?"))]
    assert together(said, ()) == said[1]
    assert together(said[:2], ()) == said[0]  # as common: the first
    ranked = [(Prediction("q", "yes", scores), "yes") for scores in ((-1.0, -2.0), (-4.0, -1.0))]
    best, raw = together(ranked, (" yes", " no"))
    assert best.scores == (-2.5, -1.5) and best.text == raw == "no"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shots": -1}, "shots=-1"),
        ({"control": "dark"}, "choose one of blank"),
        ({"source": "best"}, "choose one of random"),
        ({"control": "text_only_shots"}, "needs shots=1"),
        ({"shots": 1, "control": "shuffled_shots"}, "needs shots=2"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Setting(**fields)


def test_settings_are_all_shots_with_their_seeds_then_the_controls():
    config = EvalConfig(benchmark="easy_vqa", shots=(4, 0, 4), trials=2, seed=5, limit=90, control_limit=20)
    found = [(s.shots, s.control, s.limit, s.seed) for s in config.settings()]
    assert found[:4] == [(0, None, 90, 5), (0, None, 90, 6), (4, None, 90, 5), (4, None, 90, 6)]
    controls = [(0, "blank"), (4, "text_only_shots"), (4, "shuffled_shots")]
    assert found[4:] == [(n, control, 20, seed) for n, control in controls for seed in (5, 6)]
    assert len({setting.slug for setting in config.settings()}) == 10


def test_without_shots_or_controls_only_what_can_be_asked_is():
    assert [s.name for s in EvalConfig(benchmark="x", shots=(0,)).settings()] == [
        "0-shot",
        "0-shot, images blanked",
    ]
    assert [s.name for s in EvalConfig(benchmark="x", shots=(0, 8), control_limit=0).settings()] == [
        "0-shot",
        "8-shot",
    ]
