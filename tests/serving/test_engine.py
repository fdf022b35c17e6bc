"""The engine that page, terminal and files ask."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from flamingo.serving.engine import Engine
from flamingo.serving.prompt import Prompt, Sampling, joined, open_picture
from tests.eval.harness_model import write_model

RED, BLUE = (Image.new("RGB", (64, 48), name) for name in ("red", "blue"))
ASKED = joined([RED, "Question: what color? Answer: red", BLUE, "Question: what color? Answer:"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder)


def test_a_stream_ends_with_what_generate_says_at_once(engine: Engine) -> None:
    pieces = list(engine.stream(ASKED, Sampling(max_new_tokens=6)))
    inputs = engine.inputs(ASKED)
    out = engine.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    said = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(pieces[-1].ids) == said
    assert [len(piece.ids) for piece in pieces] == [*range(1, len(said) + 1), len(said)]
    assert pieces[-1].text == engine.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_beams_answer_too_and_a_seed_repeats_a_drawn_answer(engine: Engine) -> None:
    assert len(engine.answer(ASKED, Sampling(max_new_tokens=4, num_beams=3)).ids) <= 4
    drawn = [
        engine.answer(ASKED, Sampling(max_new_tokens=8, temperature=2.0, seed=seed)).ids
        for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_a_closed_stream_ends_its_generation_and_lets_the_next_in(engine: Engine) -> None:
    stream = engine.stream(ASKED, Sampling(max_new_tokens=300, repetition_penalty=1.5))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    assert engine.answer(ASKED, Sampling(max_new_tokens=1)).ids


def test_answers_asked_for_at_once_are_those_asked_for_one_by_one(engine: Engine) -> None:
    prompts = [joined([picture, "Question: what color? Answer:"]) for picture in (RED, BLUE)] * 3
    alone = [engine.answer(prompt).ids for prompt in prompts]
    found: dict[int, tuple[int, ...]] = {}

    def ask(number: int) -> None:
        found[number] = engine.answer(prompts[number]).ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(prompts))] == alone


def test_words_look_at_the_last_picture_where_they_see_it_alone(engine: Engine) -> None:
    answer = engine.answer(ASKED, Sampling(max_new_tokens=6))
    words = engine.looks(ASKED, answer.ids)
    assert " ".join(word.word for word in words) == " ".join(answer.text.split())
    for word in words:
        assert word.maps.shape == (2, 2, 2)
        assert word.maps[0].sum() == 0 and word.maps[1].sum() == pytest.approx(1, abs=1e-4)
        assert word.maps.min() >= 0


def test_words_without_pictures_look_nowhere(engine: Engine) -> None:
    asked = Prompt("Question: what color? Answer:")
    assert all(not len(word.maps) for word in engine.looks(asked, engine.answer(asked).ids))


def test_gates_are_those_of_the_model(engine: Engine) -> None:
    gates = engine.gates()
    assert [gate.layer for gate in gates] == engine.model.config.block_positions
    block = engine.model.gated_blocks[0]
    assert gates[0].attention == pytest.approx(torch.tanh(block.attn_gate.float()).abs().mean().item())
    assert all(0 <= value <= 1 for gate in gates for value in (gate.attention, gate.feed_forward))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: joined(["  "]), "empty"),
        (lambda: joined(["<image>", RED]), "stands for a picture"),
        (lambda: Prompt("<image><image>", (RED,)), "2 <image> in the text but 1 pictures"),
        (lambda: Sampling(temperature=-1), "temperature=-1"),
        (lambda: Sampling(top_p=0), "top_p=0"),
        (lambda: Sampling(max_new_tokens=0), "max_new_tokens=0"),
        (lambda: open_picture(Path("nowhere.png")), "picture nowhere.png cannot be read"),
        (lambda: Engine(Path("nowhere")), "nowhere holds no model"),
    ],
)
def test_bad_input_is_named(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_prompt_that_is_too_long_is_told_with_its_length(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens.*lower max_new_tokens"):
        engine.answer(Prompt("a b " * 2000), Sampling(max_new_tokens=10))
    assert engine.answer(ASKED).ids  # and the next one is answered
