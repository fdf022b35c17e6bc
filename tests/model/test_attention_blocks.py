"""Blocks of whole documents: found in any mask, with the results and gradients of whole rows."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from flamingo import attention_graph
from flamingo.attention import attend_plainly, plain_attention
from flamingo.attention_blocks import blocks_of
from flamingo.attention_products import attended
from flamingo.train.parts import compile_parts

LOWEST = torch.finfo(torch.float32).min


def mask_of(documents: list[list[int]], window: int = 0) -> torch.Tensor:
    """float[B, 1, T, T]: causal within each document, at most `window` tokens back if not 0."""
    segments = torch.tensor([[n for n, size in enumerate(row) for _ in range(size)] for row in documents])
    index = torch.arange(segments.shape[1])
    back = index[:, None] - index
    seen = (segments[:, :, None] == segments[:, None, :]) & (back >= 0)
    if window:
        seen &= back < window
    return torch.zeros(seen.shape).masked_fill(~seen, LOWEST)[:, None]


def whole(q, k, v, mask):
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
    return rearrange(scores.softmax(-1) @ v.repeat_interleave(2, dim=1), "b h t d -> b t h d")


def assert_same(ours, theirs, inputs):
    """The same results, with the same gradients of the inputs."""
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    wanted = torch.randn_like(ours)
    grads = [torch.autograd.grad((x * wanted).sum(), inputs) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("documents", [[[5, 4, 3, 5, 7]], [[9, 2, 7, 6], [4, 5, 6, 9]], [[1] * 12 + [6]]])
def test_blocks_give_the_results_and_gradients_of_whole_rows(documents, window):
    torch.manual_seed(0)
    mask = mask_of(documents, window)
    batch, tokens = len(documents), mask.shape[-1]
    q = torch.randn(batch, 4, tokens, 8, requires_grad=True)
    k, v = (torch.randn(batch, 2, tokens, 8, requires_grad=True) for _ in range(2))
    blocks = blocks_of(mask)
    assert blocks is not None and blocks.tokens.shape[1] == max(map(max, documents))
    ours, theirs = plain_attention(torch.nn.Identity(), q, k, v, mask)[0], whole(q, k, v, mask)
    assert_same(ours, theirs, (q, k, v))


def test_every_token_has_one_place():
    blocks = blocks_of(mask_of([[5, 4, 3, 5, 7]]))
    assert blocks is not None
    assert sorted(blocks.tokens[blocks.used].tolist()) == list(range(24))
    assert blocks.tokens.flatten()[blocks.places].tolist() == list(range(24))


def test_one_document_a_row_is_left_whole():
    assert blocks_of(mask_of([[12], [12]])) is None


def test_left_padding_is_no_document_of_the_text_behind_it():
    seen = torch.ones(8, 8, dtype=torch.bool).tril()
    seen[:, :3] = False
    mask = torch.zeros(1, 1, 8, 8).masked_fill(~seen, LOWEST)
    q, k, v = (torch.randn(1, 2 if i else 4, 8, 8) for i in range(3))
    ours = plain_attention(torch.nn.Identity(), q, k, v, mask)[0]
    torch.testing.assert_close(ours[:, 3:], whole(q, k, v, mask)[:, 3:], atol=1e-6, rtol=1e-5)


def test_a_mask_that_lets_documents_see_each_other_is_not_cut():
    mask = mask_of([[4, 4, 4]])
    mask[0, 0, 11, 0] = 0.0  # the last token sees the first
    assert blocks_of(mask) is None


@pytest.mark.parametrize(
    "masks",
    [
        # No size of the first is another's by chance, which the graph would hold for a rule.
        [[[9, 2, 7, 6], [4, 5, 6, 9], [3, 8, 9, 4]], [[8, 8, 8, 8]] * 5],
        pytest.param([[[5, 4, 3, 5, 7]], [[8, 8, 8, 8]]], marks=pytest.mark.slow),  # a graph of its own
    ],
    ids=["rows", "one row"],
)
def test_a_compiled_layer_takes_the_blocks_that_its_mask_brings(masks, monkeypatch):
    """One graph, without a break, for masks of other lengths too, in parts of 4 queries."""
    compared: list[list[tuple[int, ...]]] = []

    def noted(*given):
        out, weights = attended(*given)
        compared.append([tuple(part.shape[-2:]) for part in weights])
        return out, weights

    monkeypatch.setattr(attention_graph, "LEARNED", 4)
    monkeypatch.setattr(attention_graph, "attended", noted)
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = torch.compile(plain_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    for documents in masks:
        mask = mask_of(documents)
        mask.blocks = blocks_of(mask)  # type: ignore[attr-defined]
        q = torch.randn(len(documents), 4, mask.shape[-1], 8, requires_grad=True)
        k, v = (torch.randn(len(documents), 2, mask.shape[-1], 8, requires_grad=True) for _ in range(2))
        ours, _ = layer(torch.nn.Identity(), q, k, v, mask)
        assert_same(ours, whole(q, k, v, mask), (q, k, v))
        longest = max(map(max, documents))  # of blocks, not of whole rows
        cut = {9: [(3, 3), (3, 6), (3, 9)], 8: [(4, 4), (4, 8)], 7: [(4, 4), (3, 7)]}
        assert compared[-1] == cut[longest]


def test_a_compiled_layer_attends_in_whole_rows_with_and_without_a_mask():
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = torch.compile(plain_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    for mask in (None, mask_of([[12], [12]])):
        q, k, v = (torch.randn(2, 2 if n else 4, 12, 8, requires_grad=True) for n in range(3))
        ours, _ = layer(torch.nn.Identity(), q, k, v, mask)
        theirs = whole(q, k, v, torch.zeros(1) if mask is None else mask)
        assert_same(ours, theirs, (q, k, v))


def test_compiled_layers_are_one_graph_for_rows_with_and_without_blocks(build):
    """Also where documents and rows are equally many by chance, as whole rows are when a graph is made."""
    torch.compiler.reset()
    model = build()
    attend_plainly(model.language_model)
    compile_parts(model)
    for sizes in ([[12], [12], [12]], [[4, 4, 4], [4, 4, 4]], [[7, 8], [8, 7]]):
        segments = [[n for n, size in enumerate(row) for _ in range(size)] for row in sizes]
        ids = torch.randint(3, 20, (len(sizes), sum(sizes[0])))
        with torch.compiler.set_stance("default" if len(sizes) == 3 else "fail_on_recompile"):
            model(ids, segment_ids=torch.tensor(segments)).logits.sum().backward()


def test_masks_of_rows_that_are_learned_from_bring_their_blocks(build):
    model = build()
    attend_plainly(model.language_model)
    brought = []
    layer = model.language_model.model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: brought.append(getattr(kwargs["attention_mask"], "blocks", None)),
        with_kwargs=True,
    )
    ids = torch.randint(3, 20, (1, 12))
    model(ids, segment_ids=torch.tensor([[0] * 4 + [1] * 4 + [2] * 4]))
    with torch.no_grad():
        model(ids, segment_ids=torch.tensor([[0] * 4 + [1] * 4 + [2] * 4]))
    assert brought[0].tokens.shape == (3, 4) and brought[1] is None
