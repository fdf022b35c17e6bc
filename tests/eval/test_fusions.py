"""Evaluation of models whose images are several tokens of the LM's input."""

from __future__ import annotations

import pytest
import torch

from flamingo.eval.predictor import Predictor
from tests.eval.test_predictor import assert_as_alone, same_prefix, various
from tests.eval.tiny_predictor import ask, draw_pictures, fed, predictor, tiny


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("pictures"), 8)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request):
    more = {"n_positions": 128} if request.param == "gpt2" else {}
    lm = {"max_position_embeddings": 128, **more}
    return tiny(request.param, lm=lm, connector="linear", fusion="prefix")


@pytest.mark.parametrize("prompts", [various, same_prefix])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_answers_are_those_of_each_prompt_alone(lm, pictures, prompts, tokens):
    assert_as_alone(predictor(lm, tokens_per_batch=tokens), prompts(pictures))


@pytest.mark.parametrize("prompts", [various, same_prefix])
def test_beams_are_those_of_each_prompt_alone(lm, pictures, prompts):
    asked = predictor(lm, beams=3, max_new_tokens=4, length_penalty=4.0)
    assert_as_alone(asked, prompts(pictures), num_beams=3, length_penalty=4.0)


def test_few_pictures_in_memory_change_no_answer(lm, pictures):
    small = predictor(lm, images_gib=3e-6)
    assert small.images.room < 8
    assert_as_alone(small, various(pictures))


def test_classes_are_ranked_by_their_likelihood(lm, pictures):
    asked: Predictor = predictor(lm)
    classes = (" a", " b c", " b d")
    for prompt, scores in asked.rank(various(pictures), classes):
        given = fed(asked, prompt)
        for name, score in zip(classes, scores, strict=True):
            own = asked.processor.tokenizer(name, return_tensors="pt")["input_ids"]  # type: ignore
            ids = torch.cat((given["input_ids"], own), dim=1)
            with torch.inference_mode():
                logits = lm(ids, pixel_values=given["pixel_values"]).logits[0].log_softmax(-1)
            start = given["input_ids"].shape[1] - 1
            wanted = sum(logits[start + i, token] for i, token in enumerate(own[0]))
            assert score == pytest.approx(float(wanted), abs=1e-3)


def test_a_prompt_whose_images_do_not_fit_is_told_with_its_true_length(pictures):
    small = predictor(tiny("llama", lm={"max_position_embeddings": 12}, connector="linear", fusion="prefix"))
    with pytest.raises(ValueError, match="has 13 tokens"):
        list(small.predict([ask("a", *pictures[:3])]))
