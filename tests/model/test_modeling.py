"""FlamingoForConditionalGeneration: what is frozen, the loss, images and their tokens, saving."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flamingo import runtime
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.runtime import recurring

FROZEN = ("language_model.", "vision_encoder.")


def is_frozen(name: str) -> bool:
    return name.startswith(FROZEN)


# -- what is frozen ----------------------------------------------------------------------


def test_a_step_of_an_optimizer_over_all_parameters_changes_the_trained_ones_only(build, ids, pixels):
    model = build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {name for name, _ in model.named_parameters() if not is_frozen(name)}


def test_the_trained_modules_hold_all_that_is_trained(model):
    trained = {p for module in model.trained_modules().values() for p in module.parameters()}
    assert trained == {p for p in model.parameters() if p.requires_grad}


def test_training_mode_is_for_the_trained_modules_only(build):
    model = build("gpt2").train()
    assert all(module.training for module in model.trained_modules().values())
    for part in (model.vision_encoder, model.language_model):
        assert not any(module.training for module in part.modules())


def test_dropout_of_a_frozen_lm_does_nothing_in_training(build, ids, pixels):
    lm = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = build("gpt2", lm=lm)
    with torch.no_grad():
        still = model.eval()(input_ids=ids, pixel_values=pixels).logits
        training = [model.train()(input_ids=ids, pixel_values=pixels).logits for _ in range(2)]
    assert torch.equal(training[0], still) and torch.equal(training[1], still)


# -- the loss ----------------------------------------------------------------------------


@pytest.fixture
def labels(ids):
    """Loss on five tokens; the first of a row is never predicted."""
    kept = torch.tensor([[1, 0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    return ids.masked_fill(~kept, -100)


def by_hand(logits, labels):
    """Per supervised token, from all logits."""
    losses = [
        F.cross_entropy(logits[row, column - 1], labels[row, column])
        for row in range(labels.shape[0])
        for column in range(1, labels.shape[1])
        if labels[row, column] != -100
    ]
    return torch.stack(losses)


def test_the_loss_is_that_of_all_logits_at_the_supervised_tokens(model, ids, pixels, labels):
    expected = by_hand(model(input_ids=ids, pixel_values=pixels).logits, labels)
    given = {"input_ids": ids, "pixel_values": pixels, "labels": labels}
    assert len(expected) == 5
    for reduction, value in [
        ("none", expected),
        ("sum", expected.sum()),
        ("mean", expected.mean()),
    ]:
        torch.testing.assert_close(model(**given, reduction=reduction).loss, value)
    torch.testing.assert_close(model(**given).loss, expected.mean())


def test_with_labels_only_the_logits_that_make_the_loss_are_made(model, ids, pixels, labels):
    full = model(input_ids=ids, pixel_values=pixels).logits
    few = model(input_ids=ids, pixel_values=pixels, labels=labels).logits
    assert full.shape == (2, 7, 22) and few.shape == (1, 5, 22)
    torch.testing.assert_close(few[0], full[:, :-1][labels[:, 1:] != -100])


def test_logits_that_fill_up_a_product_are_not_given_back_and_learn_nothing(model, ids, pixels, monkeypatch):
    """65 positions are supervised; the LM's head makes logits of 68."""
    monkeypatch.setattr(runtime, "arithmetic", lambda: "bfloat16")  # whose products are prepared
    long, count = torch.cat((ids, ids[:, -1:].expand(-1, 53)), dim=1), 65
    order = torch.rand(2, 59, generator=torch.Generator().manual_seed(0)).flatten().argsort()
    kept = F.pad((order < count).view(2, 59), (1, 0))  # the first token of a row is never predicted
    labels = torch.where(kept, long, -100)
    heights = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: heights.append(output.shape[1]))
    out = model(input_ids=long, pixel_values=pixels, labels=labels, reduction="none")
    handle.remove()
    logits = model(input_ids=long, pixel_values=pixels).logits
    assert heights == [68] == [recurring(count)]
    torch.testing.assert_close(out.logits[0], logits[:, :-1][labels[:, 1:] != -100])
    ours, theirs = out.loss, by_hand(logits, labels)
    torch.testing.assert_close(ours, theirs)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.randn(count, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        *(torch.autograd.grad((nll * wanted).sum(), trained) for nll in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_without_labels_the_logits_of_the_last_positions_can_be_asked_for(model, ids, pixels, count):
    full = model(input_ids=ids, pixel_values=pixels).logits
    last = model(input_ids=ids, pixel_values=pixels, logits_to_keep=count).logits
    torch.testing.assert_close(last, full[:, -count:])


def test_a_batch_without_targets_has_a_sum_of_zero(model, ids, pixels):
    labels = torch.full_like(ids, -100)
    out = model(input_ids=ids, pixel_values=pixels, labels=labels, reduction="sum")
    assert out.loss.item() == 0.0


def test_padding_changes_no_loss(model, ids, pixels, labels):
    """Right padding as in training, a longer row in the batch."""
    expected = model(input_ids=ids, pixel_values=pixels, labels=labels, reduction="none").loss
    padded = model(
        input_ids=F.pad(ids, (0, 3)),
        attention_mask=F.pad(torch.ones_like(ids), (0, 3)),
        pixel_values=pixels,
        labels=F.pad(labels, (0, 3), value=-100),
        reduction="none",
    ).loss
    torch.testing.assert_close(padded, expected)


def test_no_token_sees_what_comes_after_it(model, ids, pixels):
    """Neither later text nor a later image."""
    whole = model(input_ids=ids, pixel_values=pixels).logits[:1]
    other = model(input_ids=ids[:1, :3], pixel_values=pixels[:1]).logits
    torch.testing.assert_close(whole[:, :3], other, atol=1e-4, rtol=1e-4)


# -- images and their tokens -------------------------------------------------------------


@pytest.mark.parametrize("pictures", [0, 2, 4])
def test_another_number_of_images_than_image_tokens_is_refused(model, ids, pixels, pictures):
    given = torch.cat((pixels, pixels))[:pictures]
    with pytest.raises(ValueError, match=f"3 <image> tokens.* {pictures} images"):
        model(input_ids=ids, pixel_values=given)
    with pytest.raises(ValueError, match=f"3 <image> tokens.* {pictures} images"):
        model.generate(ids, pixel_values=given, max_new_tokens=1)


def test_images_of_another_size_than_the_config_says_are_refused(model, ids):
    with pytest.raises(ValueError, match=r"grid of 9 places x 256 channels.*image_size=64"):
        model(input_ids=ids, pixel_values=torch.zeros(3, 3, 80, 80))  # 2.5 of 32 pixels


def test_images_encoded_before_give_the_same_as_pixels(model, ids, pixels):
    expected = model(input_ids=ids, pixel_values=pixels).logits
    grids = model.encode_images(pixels)
    for media in (model.media(grids=grids), model.media(latents=model.resampler(grids))):
        torch.testing.assert_close(model(input_ids=ids, media=media).logits, expected)


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_is_the_same_in_any_batch(model, ids, pixels, row):
    """Also when it is the only one: the batch decides nothing."""
    together = model(input_ids=ids, pixel_values=pixels).logits[row : row + 1]
    own = pixels[:2] if row == 0 else pixels[2:]
    alone = model(input_ids=ids[row : row + 1], pixel_values=own).logits
    torch.testing.assert_close(together, alone)


def test_a_row_without_images_is_the_same_alone_and_beside_rows_with_images(model, ids, pixels):
    text = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
    alone = model(input_ids=text).logits
    assert alone.shape == (1, 7, 22)
    mixed = model(input_ids=torch.cat((text, ids)), pixel_values=pixels).logits[:1]
    torch.testing.assert_close(alone, mixed)
    none = model(input_ids=text, pixel_values=pixels[:0]).logits  # no images: 0 pictures
    torch.testing.assert_close(none, alone)


def test_each_image_reaches_the_text_after_it_and_none_before(model, ids, pixels):
    def logits(pictures):
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=pictures).logits

    before = logits(pixels)
    reached = {0: (0, 0), 1: (0, 3), 2: (1, 2)}  # image -> row, first token
    for image, (row, first) in reached.items():
        other = pixels.clone()
        other[image] = other[image].flip(-1) * 2
        changed = (logits(other) != before).any(dim=-1)
        assert changed[row, first:].all()
        assert not changed[row, :first].any() and not changed[1 - row].any()


# -- <|endofchunk|> ----------------------------------------------------------------------


def test_the_end_of_a_chunk_can_be_learned_and_then_ends_the_answer(build):
    model = build()
    end = model.config.end_of_chunk_token_id
    prompt = torch.tensor([[3, 4, 5, 6]])
    write = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    before = model.generate(prompt, suppress_tokens=[end, 2], **write)[0, 4:6].tolist()
    learned = torch.tensor([[3, 4, 5, 6, *before, end]])
    labels = learned.clone()
    labels[:, :4] = -100
    optimizer = torch.optim.Adam([model.added_tokens.output], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=learned, labels=labels).loss.backward()
        optimizer.step()
    assert model.generate(prompt, suppress_tokens=[2], **write).tolist() == learned.tolist()


def test_the_rows_of_added_tokens_get_gradients_as_inputs_and_as_outputs(build, ids, pixels):
    model = build()
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    assert model.added_tokens.output.grad[0].any()
    assert model.added_tokens.input.grad[1].any()
    assert not model.added_tokens.input.grad[0].any()  # its only <|endofchunk|> ends a row


# -- where it looks ----------------------------------------------------------------------


def test_attention_maps_are_shares_of_the_image_that_a_token_sees(model, ids, pixels):
    maps = model.attention_maps(ids, pixels)
    assert maps.shape == (2, 7, 4) and maps.dtype == torch.float32
    sees = torch.tensor([[1.0] * 7, [0.0, 0.0, *[1.0] * 5]])
    torch.testing.assert_close(maps.sum(dim=-1), sees)
    assert (maps >= 0).all() and not maps[1, :2].any()


def test_attention_maps_are_shares_also_while_all_gates_are_shut(build, ids, pixels):
    maps = build(gate_init=0.0).attention_maps(ids, pixels)
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(7))


def test_attention_maps_follow_the_blocks_whose_gates_are_open(build, ids, pixels):
    model = build()

    def maps(first: float, second: float):
        for block, gate in zip(model.gated_blocks, (first, second), strict=True):
            block.attn_gate.data.fill_(gate)
        return model.attention_maps(ids, pixels)

    only_first, only_second = maps(1e-6, 0.0), maps(0.0, -1e-6)
    assert (only_first - only_second).abs().max() > 1e-3
    torch.testing.assert_close(maps(1e-6, -1e-6), (only_first + only_second) / 2)


def test_attention_maps_of_text_alone_are_zero(model, pixels):
    maps = model.attention_maps(torch.tensor([[3, 4, 5]]), pixels[:0])
    assert maps.shape == (1, 3, 4) and not maps.any()


def test_attention_maps_of_missing_pictures_are_refused(model, ids, pixels):
    for given in (pixels[:0], pixels[:2]):
        with pytest.raises(ValueError, match="3 <image> tokens"):
            model.attention_maps(ids, given)


# -- starting ----------------------------------------------------------------------------


def test_projections_start_by_their_fan_in(build):
    model = build(initializer_range=0.01, resampler_head_dim=32, cross_attention_head_dim=32)
    block, (attention, feed) = model.gated_blocks[0], model.resampler.layers[0]
    for linear in (block.attn.to_q, block.attn.to_kv, block.ff[1], attention.to_q, attention.to_kv, feed[1]):
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.15)
    for linear in (block.attn.to_out, block.ff[-1], attention.to_out, feed[-1]):
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.15)


# -- saving ------------------------------------------------------------------------------


LMS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt2", {"tie_word_embeddings": True}),
    ("gpt_neox", {}),
    ("gemma3_text", {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 8}),
]


def saved(model, folder, dtype=torch.float32) -> FlamingoForConditionalGeneration:
    model.save_pretrained(folder)
    return FlamingoForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def same_weights(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("family", "lm"), LMS)
def test_a_saved_model_comes_back_bitwise(build, ids, pixels, tmp_path, family, lm):
    model = build(family, lm=lm)
    back = saved(model, tmp_path)
    assert same_weights(model, back) and not back.training
    # Mapped files are aligned differently in memory, which may show in the last bit of a product.
    expected = model(input_ids=ids, pixel_values=pixels).logits
    out = back(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    tied = back.get_input_embeddings().weight is back.get_output_embeddings().weight
    assert tied == lm.get("tie_word_embeddings", False)


def test_a_model_saved_in_half_precision_comes_back_bitwise(build, ids, pixels, tmp_path):
    first = saved(build().to(torch.bfloat16), tmp_path / "first", torch.bfloat16)
    second = saved(first, tmp_path / "second", torch.bfloat16)
    assert first.dtype == torch.bfloat16 and same_weights(first, second)
    with torch.no_grad():
        expected = first(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(second(input_ids=ids, pixel_values=pixels).logits, expected)


def test_a_loaded_model_is_frozen_like_a_new_one(model, tmp_path):
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    back = saved(model, tmp_path)
    assert [name for name, p in back.named_parameters() if p.requires_grad] == trained


def test_an_architecture_comes_back_from_its_config(build, tmp_path):
    architecture = {"cross_attention_layers": [1, 3], "resampler_width": None, "gate_init": 0.25}
    config = build(**architecture).config
    config.save_pretrained(tmp_path)
    back = type(config).from_pretrained(tmp_path)
    assert back.to_dict() == config.to_dict()
    assert back.block_positions == [1, 3]
