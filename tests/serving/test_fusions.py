"""Page, terminal, files and harnesses with a model whose images are vectors in the LM's input."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from flamingo.eval.asking import Asked, Asker
from flamingo.serving.batch import Batcher
from flamingo.serving.chat import Chat
from flamingo.serving.demo.asking import Asking, Told
from flamingo.serving.demo.limits import Limits
from flamingo.serving.engine import Engine
from flamingo.serving.prompt import Sampling, joined
from flamingo.serving.requests import Request
from tests.eval.harness_model import write_model

RED, BLUE = (Image.new("RGB", (64, 48), name) for name in ("red", "blue"))
ASK = "Question: what color? Answer:"
ASKED = joined([RED, f"{ASK} red", BLUE, ASK])
FOUR = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two pictures beside it."""
    folder = tmp_path_factory.mktemp("prefix")
    write_model(folder, connector="mlp", fusion="prefix", connector_scale=0.3)
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue.png")
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder)


def test_a_stream_is_what_generate_says(engine: Engine) -> None:
    inputs = engine.inputs(ASKED)
    out = engine.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert list(engine.answer(ASKED, FOUR).ids) == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_words_look_at_all_pictures_before_them(engine: Engine) -> None:
    answer = engine.answer(ASKED, FOUR)
    words = engine.looks(ASKED, answer.ids)
    assert " ".join(word.word for word in words) == " ".join(answer.text.split())
    for word in words:
        assert word.maps.shape == (2, 2, 2)
        assert word.maps.sum() == pytest.approx(1, abs=1e-4) and (word.maps.sum(dim=(1, 2)) > 0).all()
    told = Asking(engine, Limits()).look(Told(tuple(words), (RED, BLUE)), 0)
    assert "Picture 1" in told and "attend_to" not in told and "dimmed:" not in told


def test_the_room_counts_every_vector_of_a_picture(engine: Engine) -> None:
    text = engine.tokenizer(ASKED.text, add_special_tokens=False)["input_ids"]
    assert engine.length(ASKED) == len(text) + 2 * 3  # 4 places: 3 more than <image> itself
    config = engine.model.config.get_text_config()
    before, config.max_position_embeddings = config.max_position_embeddings, engine.length(ASKED) + 4
    try:
        answer = engine.answer(ASKED, FOUR)
        assert engine.looks(ASKED, answer.ids)
        with pytest.raises(
            ValueError, match=f"the prompt has {engine.length(ASKED)} tokens and the answer may"
        ):
            engine.answer(ASKED, Sampling(max_new_tokens=5))
        with pytest.raises(ValueError, match="the answer may have 5"):
            engine.looks(ASKED, [5] * 5)
    finally:
        config.max_position_embeddings = before


def test_a_model_without_gates_has_none_to_show(engine: Engine) -> None:
    assert engine.gates() == []


def test_the_page_shows_no_gates_then(engine: Engine) -> None:
    pytest.importorskip("gradio", reason="the demo page needs gradio")
    from flamingo.serving.demo import page
    from flamingo.serving.demo.asking import Asking
    from flamingo.serving.demo.limits import Limits

    blocks = page.build(Asking(engine, Limits()), "tiny", 4)
    names = {block.elem_id for block in blocks.blocks.values()}
    assert "answer" in names and "gates" not in names


def test_a_file_of_prompts_is_answered_as_each_alone(engine: Engine, folder: Path) -> None:
    red, blue = folder / "red.png", folder / "blue.png"
    requests = [
        Request("two", f"<image>{ASK} red<image>{ASK}", (), (red, blue), FOUR),
        Request("one", f"<image>{ASK}", (), (red,), FOUR),
    ]
    found = {r["id"]: r for batch in Batcher(engine, 2).answers(requests) for r in batch}
    two = joined([RED, f"{ASK} red", BLUE, ASK])
    assert found["two"]["answer"] == engine.answer(two, FOUR).text
    assert found["two"]["prompt_tokens"] == engine.length(two)
    assert found["one"]["answer"] == engine.answer(joined([RED, ASK]), FOUR).text


def test_a_conversation_goes_on_with_its_pictures(engine: Engine, folder: Path) -> None:
    chat = Chat(engine, sampling=FOUR)
    chat.add([folder / "red.png"])
    first = list(chat.ask("what color?"))[-1].text
    chat.add([folder / "blue.png"])
    second = list(chat.ask("what color?"))[-1].text
    parts = [
        RED,
        f"Question: what color? Answer: {first}<|endofchunk|>",
        BLUE,
        "Question: what color? Answer:",
    ]
    assert second == engine.answer(joined(parts), FOUR).text


def test_harnesses_get_the_same_answers_and_likelihoods(engine: Engine, folder: Path) -> None:
    asker = Asker(folder, device="cpu")
    asked = [Asked(ASKED.text, (RED, BLUE)), Asked(f"<image>{ASK}", (RED,))]
    said = asker.generate(asked, {"max_new_tokens": 4, "until": []})
    assert [each.text for each in said] == [
        engine.answer(joined(parts), FOUR).text for parts in ([RED, f"{ASK} red", BLUE, ASK], [RED, ASK])
    ]
    together = asker.likelihoods([(each, " red") for each in asked])
    alone = [asker.likelihoods([(each, " red")])[0] for each in asked]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    blind = asker.likelihoods([(Asked(f"<image>{ASK}", (BLUE,)), " red")])[0][0]
    assert blind != pytest.approx(alone[1][0], abs=1e-4)  # pictures matter
