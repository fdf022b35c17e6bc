"""Many prompts at once get the answers that each gets alone, and nothing is computed twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flamingo.attention import attend_plainly
from flamingo.eval.few_shot import blanked
from flamingo.eval.predictor import Predictor
from tests.eval.tiny_predictor import LMS, Passes, alone, ask, draw_pictures, fed, predictor, tiny

cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="attends plainly on a CPU only")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("pictures"), 8)


@pytest.fixture(scope="module", params=LMS)
def lm(request):
    family, fields = LMS[request.param]
    return tiny(family, lm=fields)


def various(pictures) -> list:
    """Prompts of many lengths: with shots of their own, without, with two pictures, with none, blank."""
    shots = (("a b", pictures[0]), ("c d e f", pictures[1]))
    return [
        ask("a b c", pictures[2]),
        ask("d", pictures[3]),
        ask("e f", pictures[2], shots=shots),
        ask("a b c d e", pictures[4], shots=shots[:1]),
        ask("g", pictures[5], pictures[6], shots=shots[::-1]),
        ask("h i j k"),
        ask("b c d", None, shots=(("q", None),)),
    ]


def same_prefix(pictures) -> list:
    shots = (("a b", pictures[0]), ("c d e f", pictures[1]), ("g", None))
    queries = [("a", 2), ("b c d", 3), ("e f g h", 4), ("i j k l", 2), ("m n o", 5)]
    return [ask(text, pictures[i], shots=shots) for text, i in queries] + [ask("p q", shots=shots)]


def assert_as_alone(asked: Predictor, prompts: list, **options) -> None:
    found = dict(asked.predict(prompts))
    assert set(map(id, found)) == set(map(id, prompts))
    assert [found[p] for p in prompts] == [alone(asked, p, **options) for p in prompts]
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("tokens", [1, 24, 2048])
def test_answers_are_those_of_each_prompt_alone(lm, pictures, tokens):
    assert_as_alone(predictor(lm, tokens_per_batch=tokens), various(pictures))


@pytest.mark.parametrize("tokens", [1, 2048])
def test_a_shared_prefix_changes_no_answer(lm, pictures, tokens):
    assert_as_alone(predictor(lm, tokens_per_batch=tokens), same_prefix(pictures))


@pytest.mark.parametrize("prompts", [various, same_prefix])
def test_beams_are_those_of_each_prompt_alone(lm, pictures, prompts):
    asked = predictor(lm, beams=3, max_new_tokens=4, length_penalty=4.0)  # for long answers, to compare
    assert_as_alone(asked, prompts(pictures), num_beams=3, length_penalty=4.0)


def test_the_length_penalty_is_used(pictures):
    """Rewarded for length, beams write more before they end."""
    model = tiny(lm={"initializer_range": 0.3})
    lengths = []
    for penalty in (-8.0, 8.0):
        asked = predictor(model, beams=3, max_new_tokens=6, length_penalty=penalty)
        lengths.append(sum(len(text.split()) for _, text in asked.predict(various(pictures))))
    assert lengths[0] < lengths[1]


@cpu
@pytest.mark.parametrize("prompts", [various, same_prefix])
def test_it_works_where_the_lm_attends_plainly(pictures, prompts):
    model = tiny(lm={"num_key_value_heads": 2})
    wanted = [alone(predictor(model), p) for p in prompts(pictures)]
    attend_plainly(model.language_model)
    found = dict(predictor(model).predict(prompts(pictures)))
    assert [text for _, text in sorted(found.items(), key=lambda pair: pair[0].example.id)] == [
        text for _, text in sorted(zip(prompts(pictures), wanted), key=lambda pair: pair[0].example.id)
    ]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("prompts", [various, same_prefix])
def test_it_works_for_models_that_see_all_images_before(pictures, prompts, beams):
    asked = predictor(tiny(attend_to="previous"), beams=beams, length_penalty=4.0)
    options = {"num_beams": beams, "length_penalty": 4.0} if beams > 1 else {}
    assert_as_alone(asked, prompts(pictures), **options)


def test_scores_after_a_shared_prefix_are_those_without(lm, pictures):
    """Closer than answers can tell: likelihoods of all words."""
    prompts, classes = same_prefix(pictures), [" a", " b", " c"]
    together = dict(predictor(lm).rank(prompts, classes))
    for prompt in prompts:
        ((_, single),) = predictor(lm).rank([prompt], classes)
        assert together[prompt] == pytest.approx(single, abs=1e-4)


# -- nothing twice -----------------------------------------------------------------------


def test_the_prefix_is_read_once(pictures):
    model = tiny()
    passes, prompts = Passes(model), same_prefix(pictures)
    asked = predictor(model, max_new_tokens=1)
    asked._free  # what the LM can is asked once  # noqa: B018
    passes.shapes.clear()
    list(asked.predict(prompts))
    length = fed(asked, prompts[0])["input_ids"].shape[1] - 2  # its own are <image> and a word
    assert passes.shapes[0] == (1, length)
    assert all(tokens <= 6 for _, tokens in passes.shapes[1:])
    assert sum(rows for rows, _ in passes.shapes[1:]) == len(prompts)
    list(
        asked.predict(
            [ask("q q", pictures[6], shots=tuple(zip(["a b", "c d e f", "g"], [*pictures[:2], None])))]
        )
    )
    assert passes.shapes[-1] == (1, 3)  # nor again in another call


def test_pictures_are_encoded_and_projected_once(pictures):
    model = tiny()
    encoded, projected = [], []
    model.vision_encoder.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    block: nn.Module = model.gated_blocks[0].attn.to_kv  # type: ignore[union-attr,assignment]
    block.register_forward_hook(lambda module, args, out: projected.append(len(args[0])))
    asked = predictor(model)
    for prompts in (various(pictures), same_prefix(pictures), various(pictures)):
        list(asked.predict(prompts))
    assert sum(encoded) == sum(projected) == asked.images.encoded == 8  # 7 pictures and a blank one


def test_memory_for_pictures_is_bounded_and_answers_stay(pictures):
    model = tiny()
    wanted = dict(predictor(model).predict(various(pictures)))
    asked = predictor(model, images_gib=1e-9)
    assert asked.images.room == 1
    assert dict(asked.predict(various(pictures))) == wanted
    assert asked.images.encoded > 8
    assert asked.images.media is not None and len(asked.images.media) <= 4  # what one prompt needs
    list(asked.predict([ask("a", pictures[0])] * 2))
    assert len(asked.images._places) == len(asked.images._latents) == 1


def test_latents_are_those_of_the_model(pictures):
    asked = predictor(tiny(), images_gib=1e-9)
    images = [pictures[1], None, pictures[0], pictures[1]]
    grids = asked.model.encode_images(torch.stack([asked.pixels(i) for i in images]))
    torch.testing.assert_close(asked.encode(images), asked.model.resampler(grids).detach())
    assert asked.images.encoded == 3


def test_equal_prompts_are_asked_once(pictures):
    model = tiny()
    passes = Passes(model)
    queries = [ask(text, picture) for picture in pictures for text in ("a b", "c d")]
    asked = predictor(model, max_new_tokens=1)
    answers = list(asked.predict(map(blanked, queries)))
    assert passes.shapes == [(2, 3)] and asked.images.encoded == 1
    assert sorted(prompt.example.id for prompt, _ in answers) == sorted(q.example.id for q in queries)


def test_batches_hold_what_they_may_and_little_padding(pictures):
    model = tiny()
    passes = Passes(model)
    texts = [" ".join("abcdefghijklmnopq"[:n]) for n in range(1, 18)]
    prompts = [ask(text, picture) for text in texts for picture in pictures]
    list(predictor(model, tokens_per_batch=64, max_new_tokens=1).predict(prompts))
    assert all(rows * tokens <= 64 for rows, tokens in passes.shapes)
    real = sum(2 + n for n in range(17)) * len(pictures)
    computed = sum(rows * tokens for rows, tokens in passes.shapes)
    assert real <= computed <= 1.125 * real
    assert len(passes.shapes) < 1.5 * computed / 64


def test_one_token_takes_one_pass_and_rows_that_ended_none(pictures):
    model = tiny()
    passes = Passes(model)
    asked = predictor(model, max_new_tokens=1)
    prompts = [ask(" ".join(pair), p) for pair in ("ab", "cd", "ef") for p in pictures]
    list(asked.predict(prompts))
    assert passes.shapes == [(24, 3)]
    end = model.config.end_of_chunk_token_id
    with torch.no_grad():  # now about half of the answers end at once
        first = torch.stack([model(**fed(asked, p)).logits[0, -1] for p in prompts])
        gap = (first[:, end] - first.amax(dim=1)).median()
        first[:, end] += 1e-4 - gap
        first[:, model.config.image_token_id] = -torch.inf
        going = sum(token not in (end, 2) for token in first.argmax(dim=1).tolist())
        head = model.added_tokens
        hook = head.register_forward_hook(
            lambda module, args, out: (
                torch.cat((out[..., :1] - gap + 1e-4, out[..., 1:]), dim=-1)
                if args[0].is_floating_point()
                else None
            )
        )
    passes.shapes.clear()
    asked = predictor(model, max_new_tokens=3)
    answers = [text for _, text in asked.predict(prompts)]
    assert 0 < going < 24 and passes.shapes[:2] == [(24, 3), (going, 1)]
    assert sorted(answers) == sorted(alone(asked, p) for p in prompts)
    hook.remove()


# -- whose model it is -------------------------------------------------------------------


def test_a_model_in_training_stays_as_it_is(pictures):
    model = tiny()
    wanted = dict(predictor(model).predict(various(pictures)))
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    asked = predictor(model)
    for _ in asked.predict(various(pictures)):
        assert {name: module.training for name, module in model.named_modules()} == modes
    assert dict(asked.predict(various(pictures))) == wanted
    ids = fed(asked, various(pictures)[0])
    model(**ids, labels=ids["input_ids"]).loss.backward()  # nothing of it was left without gradients
    assert any(p.grad is not None for p in model.parameters())


def test_a_folder_answers_as_its_model(pictures, tmp_path):
    asked = predictor(tiny(), max_new_tokens=2)
    asked.model.save_pretrained(tmp_path)
    asked.processor.save_pretrained(tmp_path)
    loaded = Predictor(tmp_path, max_new_tokens=2, tokens_per_batch=16)
    loaded.model.cpu()
    assert dict(loaded.predict(various(pictures))) == dict(asked.predict(various(pictures)))
    assert not loaded.model.training and loaded.max_new_tokens == 2


def test_questions_may_come_while_others_are_answered(pictures):
    """As calibration does: the pictures of both share a memory that is too small for them."""
    asked = predictor(tiny(), images_gib=1e-9, tokens_per_batch=12)
    wanted = dict(predictor(asked.model).rank(various(pictures), [" a", " b"]))
    for prompt, scores in asked.rank(various(pictures), [" a", " b"]):
        list(asked.predict(same_prefix(pictures)))
        assert scores == pytest.approx(wanted[prompt], abs=1e-4)


# -- mistakes ----------------------------------------------------------------------------


def test_mistakes_are_named(pictures, tmp_path):
    model = tiny()
    for options, said in (
        ({"beams": 0}, "beams=0: must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: must be at least 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0: must be at least 1"),
        ({"images_gib": 0.0}, "images_gib=0.0: must be more than 0"),
    ):
        with pytest.raises(ValueError, match=said):
            predictor(model, **options)
    asked = predictor(model)
    with pytest.raises(ValueError, match="max_new_tokens=0: nothing would be written"):
        list(predictor(model, max_new_tokens=0).predict(various(pictures)))
    with pytest.raises(ValueError, match="has 2 <image> and 1 pictures"):
        list(asked.predict([ask("a <image> b", pictures[0])]))
    with pytest.raises(ValueError, match=r"has 65 tokens and up to 5 follow, the LM has 64 positions"):
        list(asked.predict([ask(" ".join("a" * 64), pictures[0])]))
    with pytest.raises(ValueError, match="nothing.png cannot be read"):
        list(asked.predict([ask("a", tmp_path / "nothing.png")]))
    (tmp_path / "torn.png").write_bytes(pictures[0].read_bytes()[:200])
    with pytest.raises(ValueError, match="torn.png cannot be read"):
        list(asked.predict([ask("a", tmp_path / "torn.png")]))
