"""Writing with pictures: batches, beams, the cache, and what may never be written."""

from __future__ import annotations

import pytest
import torch

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def write(model, prompt, pixels, mask=None, **options):
    """Only the new tokens."""
    mask = torch.ones_like(prompt) if mask is None else mask
    pixels = pixels if len(pixels) else None
    options = {**GREEDY, **options}
    out = model.generate(prompt, attention_mask=mask, pixel_values=pixels, **options)
    return out[:, prompt.shape[1] :]


LMS = {
    "llama": {},  # rotary positions
    "gpt2": {},  # learned positions
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},  # taken from the mask
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},  # distances
}


def alone_and_together(model, rows, images, pixels):
    """What each row writes by itself, and in one left-padded batch."""
    starts = [sum(images[:i]) for i in range(len(rows))]
    alone = [
        write(model, torch.tensor([row]), pixels[start : start + count], eos_token_id=None)
        for row, start, count in zip(rows, starts, images, strict=True)
    ]
    longest = max(map(len, rows))
    batch = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    together = write(model, batch, pixels[: sum(images)], mask, eos_token_id=None)
    return torch.cat(alone).tolist(), together.tolist()


@pytest.mark.parametrize("family", LMS)
def test_rows_of_a_left_padded_batch_write_what_they_write_alone(build, pixels, family):
    model = build(family, lm=LMS[family])
    i = model.config.image_token_id
    rows = [[9, 10, i, 11], [i, 5, 6, i, 7, 8, 9]]
    alone, together = alone_and_together(model, rows, [1, 2], pixels)
    assert together == alone


def test_a_row_without_images_writes_the_same_beside_rows_with_images(model, pixels):
    rows = [[3, 4], [model.config.image_token_id, 5, 6, 7]]
    alone, together = alone_and_together(model, rows, [0, 1], pixels)
    assert together == alone


def test_what_is_written_depends_on_the_picture(model, pixels):
    prompt = torch.tensor([[model.config.image_token_id, 5]])
    texts = {tuple(write(model, prompt, pixels[i : i + 1])[0].tolist()) for i in range(3)}
    assert len(texts) > 1


def test_pictures_are_encoded_and_projected_once_whatever_is_written(build, ids, pixels):
    model = build()
    calls: list[str] = []
    watched = {"encoder": model.vision_encoder, "resampler": model.resampler}
    watched |= {f"keys {i}": block.attn.to_kv for i, block in enumerate(model.gated_blocks)}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    write(model, ids, pixels, eos_token_id=None)
    assert sorted(calls) == ["encoder", "keys 0", "keys 1", "resampler"]


def test_media_that_was_encoded_before_writes_the_same(model, ids, pixels):
    media = model.media(pixel_values=pixels)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), media=media, **GREEDY)
    assert out[:, 7:].tolist() == write(model, ids, pixels).tolist()


def test_input_ids_may_be_given_by_name(model, ids, pixels):
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **GREEDY)
    assert out[:, 7:].tolist() == write(model, ids, pixels).tolist()


def test_one_beam_is_greedy(model, ids, pixels):
    expected = write(model, ids, pixels).tolist()
    assert write(model, ids, pixels, num_beams=1).tolist() == expected


def test_beams_find_the_likeliest_text_and_keep_each_row_at_its_image(model, pixels):
    """With as many beams as words, a search over two tokens is complete."""
    image, words = model.config.image_token_id, model.config.image_token_id + 1
    prompt = torch.tensor([[image, 5, 6], [7, image, 8]])
    pictures = pixels[:2]
    with torch.no_grad():
        first = logprobs(model, prompt, pictures)  # [2, V]
        likeliest = []
        for row in range(2):
            longer = torch.cat((prompt[row].expand(words, -1), torch.arange(words)[:, None]), dim=1)[
                : words - 1
            ]  # every first token but <image>
            shown = pictures[row].expand(words - 1, -1, -1, -1)
            both = first[row, :-1, None] + logprobs(model, longer, shown)  # [V - 1, V]
            best = int(both[:, :-1].argmax())
            likeliest.append([best // (words - 1), best % (words - 1)])
    options = {"max_new_tokens": 2, "num_beams": words, "eos_token_id": None}
    assert write(model, prompt, pictures, **options).tolist() == likeliest


def logprobs(model, prompt, pictures):
    """float[B, V] of the next token."""
    return model(input_ids=prompt, pixel_values=pictures).logits[:, -1].log_softmax(dim=-1)


def test_an_image_is_never_written_however_likely(build, ids, pixels):
    model = build()
    hidden = {}
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, __: hidden.update(last=args[0][0, -1]))
    model(input_ids=ids[:1], pixel_values=pixels[:2])
    handle.remove()
    image = model.config.image_token_id
    model.added_tokens.output.data[1] = 100 * hidden["last"]
    likeliest = model(input_ids=ids[:1], pixel_values=pixels[:2]).logits[0, -1].argmax()
    assert likeliest == image
    for options in ({}, {"num_beams": 3}, {"suppress_tokens": [3]}):
        text = write(model, ids[:1], pixels[:2], eos_token_id=None, **options)
        assert image not in text and text.shape == (1, 5)


def test_other_suppressed_tokens_stay_suppressed(model, ids, pixels):
    first = write(model, ids[:1], pixels[:2])[0, 0].item()
    assert write(model, ids[:1], pixels[:2], suppress_tokens=[first])[0, 0].item() != first


@pytest.mark.parametrize("stop", ["end_of_chunk_token_id", "eos_token_id"])
def test_generation_stops_at_the_end_of_a_chunk_and_at_the_lms_own_end(build, ids, pixels, stop):
    """The token is made the likeliest after the prompt's last position."""
    model = build()
    model.generation_config.eos_token_id = 2
    wanted = {"end_of_chunk_token_id": model.config.end_of_chunk_token_id, "eos_token_id": 2}[stop]
    force = torch.full((22,), -1e4)
    force[wanted] = 0.0
    head = model.get_output_embeddings()
    # After the model's own hook: what the LM says, with one token far above the others.
    head.register_forward_hook(lambda _, __, out: out + force)
    assert write(model, ids[:1], pixels[:2]).tolist() == [[wanted]]


def test_a_prompt_is_needed(model, pixels):
    with pytest.raises(ValueError, match="input_ids is missing"):
        model.generate(pixel_values=pixels)
    with pytest.raises(ValueError, match="input_ids is missing"):
        model(pixel_values=pixels)
