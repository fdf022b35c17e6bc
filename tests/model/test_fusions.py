"""Every connector with every fusion: a contract that all combinations keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flamingo import runtime
from flamingo.connectors import connectors
from flamingo.expansion import contract, expand
from flamingo.fusions import fusions
from flamingo.modeling import FlamingoForConditionalGeneration
from tests.model.conftest import END_OF_CHUNK, IMAGE, Build

PAIRS = [(connector, fusion) for connector in connectors() for fusion in fusions()]
LONG = {"max_position_embeddings": 128, "initializer_range": 0.1}
PREFIX = [IMAGE, 5, 6, END_OF_CHUNK, IMAGE, 7, 8, 9, END_OF_CHUNK]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def seer(build: Build, request) -> FlamingoForConditionalGeneration:
    connector, fusion = request.param
    return build(lm=LONG, connector=connector, fusion=fusion, connector_grid=[1, 2])


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def prefixed(build: Build, request) -> FlamingoForConditionalGeneration:
    """Vectors in the input of LMs that count positions in three ways."""
    more = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.1}, "gpt2": {"n_positions": 128}}
    lm = {**LONG, **more.get(request.param, {})}
    return build(request.param, lm=lm, connector="mlp", fusion="prefix")


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_folders_hold_what_the_design_names() -> None:
    assert set(connectors()) >= {"perceiver", "linear", "mlp", "pool"}
    assert set(fusions()) >= {"cross_attention", "prefix"}


def test_a_fusion_of_ones_own_may_stand_between_the_layers(build, ids, pixels, tmp_path, monkeypatch) -> None:
    """One file that changes what the blocks see: here, all pictures upside down in their latents."""
    (tmp_path / "upside").mkdir()
    (tmp_path / "upside" / "blocks.py").write_text(
        "from flamingo.fusions import cross_attention\n\n\n"
        "class Fusion(cross_attention.Fusion):\n"
        "    def media(self, blocks, latents):\n"
        "        return super().media(blocks, -latents)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given, own = (build("llama", fusion=name).eval() for name in ("cross_attention", "upside.blocks"))
    own.load_state_dict(given.state_dict())
    with torch.no_grad():
        one, other = (model(ids, pixel_values=pixels).logits for model in (given, own))
        blind = own(ids, pixel_values=0 * pixels).logits
    assert len(own.gated_blocks) == len(given.gated_blocks) > 0
    assert not torch.allclose(one, other, atol=1e-4) and not torch.allclose(other, blind, atol=1e-4)


def test_a_row_means_the_same_alone_and_beside_rows_with_other_images(seer, ids, pixels) -> None:
    together = seer(ids, pixel_values=pixels).logits
    assert together.shape[:2] == ids.shape
    close(together[:1], seer(ids[:1], pixel_values=pixels[:2]).logits)
    close(together[1:], seer(ids[1:], pixel_values=pixels[2:]).logits)


def test_pictures_matter_to_the_tokens_behind_them_only(seer, ids, pixels) -> None:
    other = pixels.clone()
    other[2] = 0
    one, two = (seer(ids[1:], pixel_values=p[2:]).logits[0] for p in (pixels, other))
    assert torch.equal(one[:2], two[:2]) and not torch.allclose(one[3:], two[3:], atol=1e-4)


def test_padding_on_the_right_changes_nothing(seer, ids, pixels) -> None:
    labels = ids.masked_fill(ids == IMAGE, -100)
    mask = torch.ones_like(ids)
    longer, more = (torch.cat((x, x.new_full((2, 3), other)), dim=1) for x, other in ((ids, 0), (mask, 0)))
    plain = seer(ids, mask, pixels, labels=labels, reduction="none").loss
    wanted = torch.nn.functional.pad(labels, (0, 3), value=-100)
    close(seer(longer, more, pixels, labels=wanted, reduction="none").loss, plain)


def test_the_loss_is_that_of_each_rows_logits(seer, ids, pixels) -> None:
    labels = ids.masked_fill(ids == IMAGE, -100)
    logits = seer(ids, pixel_values=pixels).logits[:, :-1].float()
    targets = labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    close(seer(ids, pixel_values=pixels, labels=labels, reduction="none").loss, nll[targets != -100])


def test_packed_documents_stay_apart(seer, ids, pixels) -> None:
    packed = torch.cat((ids[:1], ids[1:], ids[:1, :3]), dim=1)
    segments = torch.tensor([[0] * 7 + [1] * 7 + [-1] * 3])
    images = torch.cat((pixels, pixels[:1]))
    row = seer(packed, segment_ids=segments, pixel_values=images).logits
    close(row[:, :7], seer(ids[:1], pixel_values=pixels[:2]).logits)
    close(row[:, 7:14], seer(ids[1:], pixel_values=pixels[2:]).logits)


def test_generation_with_a_cache_is_generation_without(seer, ids, pixels) -> None:
    options = {"pixel_values": pixels, "max_new_tokens": 5, "do_sample": False}
    with_cache, without = (seer.generate(input_ids=ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(with_cache, without) and torch.equal(with_cache[:, :7], ids)
    for row, own in ((0, pixels[:2]), (1, pixels[2:])):
        alone = seer.generate(
            input_ids=ids[row : row + 1], pixel_values=own, max_new_tokens=5, do_sample=False
        )
        shorter = min(alone.shape[1], with_cache.shape[1])
        assert torch.equal(alone[0, :shorter], with_cache[row, :shorter])


def test_beams_and_samples_come_behind_the_rows_as_they_were_asked(seer, ids, pixels) -> None:
    out = seer.generate(
        input_ids=ids, pixel_values=pixels, num_beams=3, num_return_sequences=2, max_new_tokens=3
    )
    assert torch.equal(out[:, :7], ids.repeat_interleave(2, dim=0))
    told = seer.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=3, return_dict_in_generate=True, do_sample=False
    )
    assert torch.equal(told.sequences[:, :7], ids)


def test_a_shared_prefix_changes_nothing(seer, pixels) -> None:
    queries = torch.tensor([[IMAGE, 3, 4], [0, 11, 12]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    prefix = seer.prefix(torch.tensor([PREFIX]), pixels[:2])
    options = {"max_new_tokens": 4, "do_sample": False}
    out = seer.generate(
        input_ids=queries, attention_mask=mask, pixel_values=pixels[2:], prefix=prefix, **options
    )
    for row, (query, own) in enumerate((([IMAGE, 3, 4], pixels), ([11, 12], pixels[:2]))):
        whole = torch.tensor([PREFIX + query])
        alone = seer.generate(input_ids=whole, pixel_values=own, **options)
        shorter = min(alone.shape[1] - whole.shape[1], 4)
        start = len(PREFIX) + 3
        assert torch.equal(
            out[row, start : start + shorter], alone[0, whole.shape[1] : whole.shape[1] + shorter]
        )


def test_maps_lie_on_the_pictures_that_a_token_sees(seer, ids, pixels) -> None:
    maps = seer.attention_maps(ids, pixels)
    if seer.config.fusion == "prefix":
        assert maps.shape == (2, 7, 3, 4)
        assert not maps[0, :, 2].any() and not maps[1, :, :2].any()  # the other row's
        assert not maps[0, :3, 1].any()  # nothing after it
        maps = maps.sum(dim=2)
    assert maps.shape == (2, 7, 4)
    close(maps[0].sum(dim=-1), torch.ones(7))
    assert not maps[1, :2].any()


def test_a_saved_model_is_the_same(seer, ids, pixels, tmp_path: Path) -> None:
    seer.save_pretrained(tmp_path)
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path).eval()
    close(again(ids, pixel_values=pixels).logits, seer(ids, pixel_values=pixels).logits)


def test_all_that_is_trained_gets_a_gradient(build: Build, ids, pixels) -> None:
    for connector, fusion in PAIRS:
        seer = build(lm=LONG, connector=connector, fusion=fusion, connector_grid=[1, 2])
        seer(ids, pixel_values=pixels, labels=ids).loss.backward()
        names = [n for n, p in seer.named_parameters() if p.requires_grad and p.grad is None]
        assert not names, (connector, fusion)


def test_vectors_stand_in_the_input_where_the_image_token_is(prefixed, pixels) -> None:
    """Against the LM itself, on embeddings put together by hand."""
    seer, image = prefixed, pixels[:1]
    row = [9, IMAGE, 5, 6]
    vectors = seer.resampler(seer.encode_images(image))[0] * seer.config.connector_scale
    table = seer.get_input_embeddings()
    embeddings = torch.cat((table(torch.tensor([9])), vectors, table(torch.tensor([5, 6]))))[None]
    wanted = seer.language_model(inputs_embeds=embeddings).logits[0, :, :20]
    found = seer(torch.tensor([row]), pixel_values=image).logits[0, :, :20]
    close(found, wanted[[0, len(vectors), len(vectors) + 1, len(vectors) + 2]])


def test_positions_go_on_behind_padding_on_the_left(prefixed, pixels) -> None:
    """Generation pads rows of fewer vectors on the left."""
    rows = torch.tensor([[IMAGE, 5, IMAGE, 6], [9, 5, IMAGE, 7]])
    options = {"max_new_tokens": 4, "do_sample": False}
    both = prefixed.generate(input_ids=rows, pixel_values=pixels, **options)
    alone = prefixed.generate(input_ids=rows[1:], pixel_values=pixels[2:], **options)
    shorter = min(alone.shape[1], both.shape[1])
    assert torch.equal(both[1:, :shorter], alone[:, :shorter])


def test_expanding_and_contracting_are_inverse() -> None:
    rows = torch.tensor([[IMAGE, 5, IMAGE, 6], [9, 5, 7, IMAGE]])
    long = expand(rows, IMAGE, 3)
    assert long.input_ids.tolist()[1] == [0, 0, 9, 5, 7, IMAGE, IMAGE, IMAGE]
    assert long.attention_mask.tolist()[1] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert long.last.tolist() == [[2, 3, 6, 7], [2, 3, 4, 7]]
    assert torch.equal(contract(long.input_ids, IMAGE, 3, 4), rows)


def test_rows_grow_by_what_they_hold_and_not_by_their_padding() -> None:
    """The row of many images is short without them: its padding makes room."""
    rows = torch.tensor([[IMAGE, IMAGE, 5, 0, 0, 0], [9, 5, 7, 6, 8, 4]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    segments = torch.where(mask == 1, 0, -1)
    for given in ({"attention_mask": mask}, {"segment_ids": segments}):
        long = expand(rows, IMAGE, 3, **given)  # type: ignore[arg-type]
        assert long.input_ids.tolist() == [[IMAGE] * 6 + [5], [9, 5, 7, 6, 8, 4, 0]]
        assert long.last[0, :3].tolist() == [2, 5, 6] and int(long.last.max()) == 6
        held = long.attention_mask if "attention_mask" in given else (long.segment_ids >= 0).long()  # type: ignore[operator]
        assert held.tolist() == [[1] * 7, [1] * 6 + [0]]


def test_packed_rows_are_expanded_to_a_length_that_comes_again(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "arithmetic", lambda: "bfloat16")  # whose products are prepared
    rows = torch.tensor([[IMAGE, *[5] * 30]])  # 35 tokens with 5 an image
    long = expand(
        rows, IMAGE, 5, segment_ids=torch.zeros_like(rows), labels=rows.masked_fill(rows == IMAGE, -100)
    )
    assert long.segment_ids is not None and long.labels is not None
    assert long.segment_ids.tolist() == [[0] * 35 + [-1]]
    assert long.labels.tolist() == [[-100, *[-100] * 4, *[5] * 30, -100]]
    assert long.last.tolist() == [list(range(4, 35))]
    assert expand(rows, IMAGE, 5).input_ids.shape == (1, 35)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"connector": "qformer"}, "connector='qformer': choose one of linear, mlp, perceiver, pool"),
        ({"fusion": "early"}, "fusion='early': choose one of cross_attention, prefix"),
        ({"connector": "pool", "connector_grid": [9, 9]}, "more places than the encoder's grid of 2 x 2"),
        ({"connector_grid": [0, 1]}, "must be rows and columns"),
        ({"connector_norm": "batch"}, "connector_norm='batch': choose one of"),
        ({"connector_scale": 0.0}, "connector_scale=0.0: must be above 0"),
    ],
)
def test_what_is_not_there_is_named(build: Build, fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(**fields)


def test_clips_are_for_the_resampler(build: Build, ids) -> None:
    seer = build(connector="linear", lm=LONG)
    with pytest.raises(ValueError, match="clips of 2 frames: connector='linear' takes single pictures"):
        seer(ids[1:], pixel_values=torch.zeros(1, 2, 3, 64, 64))
