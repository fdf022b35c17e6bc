"""Classes are as likely as the LM says of each by itself, and the prompt is read once for all."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flamingo.attention import attend_plainly
from flamingo.eval.likelihood import Tree, continuations
from flamingo.eval.states import columns_are_free, keeps_keys_and_values
from tests.eval.tiny_predictor import LMS, WORDS, Passes, ask, draw_pictures, fed, predictor, tiny

# Of one token and more, with ways in common, one on the way to another, one twice.
CLASSES = (" a", " b c", " b d", " b c e f", " g h i", " b", " a", " q p o n m", " b c e k")
FREE = {"rotary", "learned", "from the mask"}  # LMS that read a tree in one pass


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("pictures"), 6)


@pytest.fixture(scope="module", params=LMS)
def lm(request):
    family, fields = LMS[request.param]
    model = tiny(family, lm=fields)
    model.named = request.param  # type: ignore[assignment]
    return model


def prompts_of(pictures) -> list:
    shots = (("a b", pictures[0]), ("c d e f", pictures[1]))
    return [
        ask("a b c", pictures[2]),
        ask("d e f", pictures[3]),
        ask("e f", pictures[2], shots=shots),
        ask("g h", pictures[4], shots=shots),
        ask("i j k l", pictures[5], shots=shots),
        ask("m", None, shots=shots[:1]),
        ask("n o p"),
    ]


@torch.inference_mode()
def alone(asked, prompt, name: str) -> float:
    """One class after one prompt as one row: the sum over its tokens."""
    given = fed(asked, prompt)
    own = asked.processor.tokenizer(name, return_tensors="pt")["input_ids"]
    ids = torch.cat((given["input_ids"], own), dim=1)
    logits = asked.model(ids, pixel_values=given["pixel_values"], use_cache=False).logits[0]
    scores = logits[-own.shape[1] - 1 : -1].double().log_softmax(dim=-1)
    return scores.gather(1, own[0][:, None]).sum().item()


def assert_as_alone(asked, prompts, classes=CLASSES) -> None:
    found = dict(asked.rank(prompts, classes))
    assert set(map(id, found)) == set(map(id, prompts))
    for prompt in prompts:
        wanted = [alone(asked, prompt, name) for name in classes]
        assert found[prompt] == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("tokens", [4, 40, 2048])
def test_classes_are_as_likely_as_each_alone(lm, pictures, tokens):
    assert_as_alone(predictor(lm, tokens_per_batch=tokens), prompts_of(pictures))


@pytest.mark.parametrize("tokens", [4, 2048])
def test_it_works_for_models_that_see_all_images_before(pictures, tokens):
    asked = predictor(tiny(attend_to="previous"), tokens_per_batch=tokens)
    assert_as_alone(asked, prompts_of(pictures))


@pytest.mark.skipif(torch.cuda.is_available(), reason="attends plainly on a CPU only")
def test_it_works_where_the_lm_attends_plainly(pictures):
    model = tiny(lm={"num_key_value_heads": 2})
    attend_plainly(model.language_model)
    assert_as_alone(predictor(model), prompts_of(pictures))


def test_it_works_for_an_lm_whose_state_cannot_be_shared(pictures):
    asked = predictor(tiny(), tokens_per_batch=30)
    asked._plain_cache, asked._free = False, False  # as `keeps_keys_and_values` says of a Mamba
    assert_as_alone(asked, prompts_of(pictures))
    wanted = dict(predictor(asked.model).predict(prompts_of(pictures)))
    assert dict(asked.predict(prompts_of(pictures))) == wanted


def test_what_an_lm_can_is_found_by_asking_it(lm):
    assert keeps_keys_and_values(lm)
    assert columns_are_free(lm) == (lm.named in FREE)


def test_an_lm_with_a_state_of_its_own_is_told():
    hybrid = {
        "linear_conv_kernel_dim": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "head_dim": 8,
    }
    model = tiny("qwen3_next", lm=hybrid)
    assert not keeps_keys_and_values(model) and not columns_are_free(model)


def test_an_lm_with_a_state_of_its_own_ranks_and_answers(pictures):
    model = tiny("mamba", lm={"state_size": 4, "conv_kernel": 2, "time_step_rank": 2})
    asked = predictor(model)
    assert_as_alone(asked, prompts_of(pictures), CLASSES[:5])


def test_one_pass_gives_all_classes_of_one_token(pictures):
    model = tiny()
    passes = Passes(model)
    asked = predictor(model)
    prompts = [ask("a b", picture) for picture in pictures]
    classes = [f" {word}" for word in WORDS]
    list(asked.rank(prompts, classes))
    assert passes.shapes == [(6, 3)]
    assert_as_alone(asked, prompts, classes)


def test_many_classes_are_read_in_parts_and_once_each(pictures):
    """729 classes of three words: of 9 + 81 nodes with children each is read once, save those on the
    way to others in a later part."""
    model = tiny()
    classes = [f" {a} {b} {c}" for a in WORDS[:9] for b in WORDS[:9] for c in WORDS[:9]]
    asked = predictor(model, tokens_per_batch=128)
    asked._free  # noqa: B018  # asked once
    passes = Passes(model)
    prompts = [ask("a b", picture) for picture in pictures[:2]]
    found = dict(asked.rank(prompts, classes))
    assert passes.shapes[0] == (1, 3) and all(rows == 1 and nodes <= 32 for rows, nodes in passes.shapes[1:])
    assert 2 * (3 + 90) <= sum(nodes for _, nodes in passes.shapes) <= 2 * (3 + 90 + 3)
    for number in (0, 100, 400, 728):
        assert found[prompts[1]][number] == pytest.approx(alone(asked, prompts[1], classes[number]), abs=2e-4)


def test_the_likelihoods_of_all_words_sum_to_one(pictures):
    model = tiny()
    asked = predictor(model)
    names = asked.processor.tokenizer.convert_ids_to_tokens(range(model.config.first_added_token_id + 2))
    ((_, scores),) = asked.rank([ask("a", pictures[0])], names)
    assert torch.tensor(scores).exp().sum().item() == pytest.approx(1, abs=1e-5)


# -- the tree ----------------------------------------------------------------------------


def test_a_tree_has_each_way_once():
    tree = Tree.of([(1,), (2, 3), (2, 4), (2, 3, 5), (1,)])
    assert tree.contexts == ((), (2,), (2, 3))
    assert len(tree.edges) == 5  # 1, 2, 2-3, 2-4, 2-3-5: the first class comes twice
    assert tree.paths[0] == tree.paths[4] and tree.longest == 3
    assert [tree.contexts[i] for i in tree.deepest] == [(2, 3)]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_parts_hold_whole_ways(most):
    tree = Tree.of([(a, b, c, 9) for a in range(3) for b in range(2) for c in range(2)])
    parts = list(tree.parts(most))
    assert {i for part in parts for i in part} == set(range(1, len(tree.contexts)))
    for part in parts:
        held = {tree.contexts[i] for i in part}
        assert all(context[:end] in held for context in held for end in range(1, len(context)))
        assert len(part) <= max(most, 3)  # one way is three long
        above = tree.above(part)
        assert above.sum(dim=1).tolist() == [len(tree.contexts[i]) for i in part]
        assert bool(above.diagonal().all()) and not bool(above.triu(1).any())


def bpe() -> PreTrainedTokenizerFast:
    """Letters, a space marked as `▁`, and two pairs that are one token."""
    letters = {letter: i for i, letter in enumerate("▁abcdx:")}
    pairs = {"▁a": 7, "xb": 8}
    words = Tokenizer(models.BPE({**letters, **pairs}, [("▁", "a"), ("x", "b")]))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_a_class_is_split_as_where_it_stands():
    """After a text no space is put before it, as some tokenizers do at the start of a text."""
    assert continuations(bpe(), "d d:", [" a", " bc", "b"]) == ((7,), (0, 2, 3), (2,))


def test_a_class_that_would_melt_with_the_prompt_stands_by_itself():
    assert continuations(bpe(), "dx", ["b"]) == ((0, 2),)


def test_mistakes_are_named(pictures):
    asked = predictor(tiny())
    with pytest.raises(ValueError, match="classes: there are none to rank"):
        list(asked.rank([ask("a", pictures[0])], []))
    with pytest.raises(ValueError, match="class '' has no tokens"):
        list(asked.rank([ask("a", pictures[0])], [" a", ""]))
