"""The gated block: each token attends to the latents of its own image, gates decide how much."""

from __future__ import annotations

import pytest
import torch

from flamingo import runtime
from flamingo.config import FlamingoConfig
from flamingo.cross_attention import GatedCrossAttentionBlock
from flamingo.media import Runs

WIDTH, MEDIA_WIDTH, HEADS, LATENTS, IMAGES = 24, 16, 3, 5, 4
SEEN = torch.tensor(
    [
        [-1, -1, 0, 0, 0, 1, 1, 1],
        [2, 2, 2, 2, 2, 2, 2, 2],
        [-1, -1, -1, -1, -1, -1, -1, -1],
        [-1, -1, -1, 3, 3, 3, 3, 3],
    ]
)


@pytest.fixture
def block() -> GatedCrossAttentionBlock:
    torch.manual_seed(0)
    config = FlamingoConfig(
        cross_attention_heads=HEADS, cross_attention_head_dim=8, cross_attention_ff_mult=2.0
    )
    return GatedCrossAttentionBlock(config, WIDTH, MEDIA_WIDTH)


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(*SEEN.shape, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(IMAGES, LATENTS, MEDIA_WIDTH, generator=torch.Generator().manual_seed(2))


def open_gates(block: GatedCrossAttentionBlock, attention: float, feed_forward: float) -> None:
    with torch.no_grad():
        block.attn_gate.fill_(attention)
        block.ff_gate.fill_(feed_forward)


def run(block, hidden, latents, seen=SEEN):
    return block(hidden, *block.attn.project_media(latents), Runs.of(seen))


def by_mask(block: GatedCrossAttentionBlock, hidden, latents, seen=SEEN) -> torch.Tensor:
    """The same in the straightforward way: attention over all images under a mask."""
    rows, length, _ = hidden.shape
    keys, values = block.attn.to_kv(latents).chunk(2, dim=-1)  # [N, L, H * D]
    split = (HEADS, 8)
    q = block.attn.to_q(block.attn.norm(hidden)).view(rows, length, *split)
    k, v = keys.reshape(-1, *split), values.reshape(-1, *split)  # [N * L, H, D]
    scores = torch.einsum("bthd,khd->bhtk", q, k) * 8**-0.5
    image_of_key = torch.arange(len(latents)).repeat_interleave(latents.shape[1])
    allowed = seen[:, None, :, None] == image_of_key
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    looked = torch.einsum("bhtk,khd->bthd", weights, v).reshape(rows, length, -1)
    hidden = hidden + block.attn_gate.tanh() * block.attn.to_out(looked)
    return hidden + block.ff_gate.tanh() * block.ff(hidden)


@pytest.mark.parametrize(("attention", "feed_forward"), [(0.8, 0.0), (0.8, -0.6), (-1.5, 0.3)])
def test_it_equals_masked_attention_over_all_images(block, hidden, latents, attention, feed_forward):
    open_gates(block, attention, feed_forward)
    expected = by_mask(block, hidden, latents)
    torch.testing.assert_close(run(block, hidden, latents), expected, atol=1e-6, rtol=1e-6)


def assert_same_with_gradients(block, hidden, latents, seen) -> None:
    given = [hidden.requires_grad_(), latents.requires_grad_(), *block.parameters()]
    ours, theirs = run(block, hidden, latents, seen), by_mask(block, hidden, latents, seen)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    wanted = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    for a, b in zip(
        *(torch.autograd.grad((out * wanted).sum(), given) for out in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_rows_that_fill_up_a_product_change_neither_result_nor_gradients(block, hidden, latents, monkeypatch):
    """133 tokens see an image, and products are of 136 rows."""
    monkeypatch.setattr(runtime, "arithmetic", lambda: "bfloat16")  # whose products are prepared
    open_gates(block, attention=0.8, feed_forward=-0.6)
    seen, hidden = SEEN.repeat_interleave(7, dim=1), hidden.repeat_interleave(7, dim=1)
    hidden += torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    runs = Runs.of(seen)
    assert (len(runs.source), len(runs.rows)) == (133, 136)
    assert_same_with_gradients(block, hidden, latents, seen)


def test_runs_in_pieces_change_neither_result_nor_gradients(block, latents):
    """A run of 200 tokens beside three of 4."""
    open_gates(block, attention=0.8, feed_forward=-0.6)
    seen = torch.tensor([[-1, *[0] * 4, *[1] * 4, *[2] * 4, *[3] * 200]])
    assert len(Runs.of(seen)) == 3 + 7
    hidden = torch.randn(*seen.shape, WIDTH, generator=torch.Generator().manual_seed(3))
    assert_same_with_gradients(block, hidden, latents, seen)


def test_tokens_before_any_image_get_exactly_nothing_from_the_attention(block, hidden, latents):
    open_gates(block, attention=2.0, feed_forward=0.0)
    out = run(block, hidden, latents)
    assert torch.equal(out[SEEN < 0], hidden[SEEN < 0])
    assert not (out[SEEN >= 0] == hidden[SEEN >= 0]).all(dim=-1).any()  # all others do


def test_the_feed_forward_applies_to_tokens_without_an_image_too(block, hidden, latents):
    open_gates(block, attention=2.0, feed_forward=1.0)
    out, none = run(block, hidden, latents), SEEN < 0
    expected = hidden + block.ff_gate.tanh() * block.ff(hidden)
    torch.testing.assert_close(out[none], expected[none], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("image", range(IMAGES))
def test_only_tokens_that_see_an_image_change_when_it_changes(block, hidden, latents, image):
    open_gates(block, attention=2.0, feed_forward=1.0)
    other = latents.clone()
    other[image] += 1.0 + torch.arange(LATENTS)[:, None]
    same = (run(block, hidden, latents) == run(block, hidden, other)).all(dim=-1)
    assert torch.equal(~same, image == SEEN)


def test_an_image_that_no_token_sees_gets_no_gradient_and_the_others_do(block, hidden, latents):
    open_gates(block, attention=2.0, feed_forward=1.0)
    latents.requires_grad_()
    seen = SEEN.masked_fill(SEEN == 1, 0)
    run(block, hidden, latents, seen).square().sum().backward()
    reached = (latents.grad != 0).flatten(1).any(dim=1)
    assert reached.tolist() == [True, False, True, True]


def test_zero_gates_change_nothing_bitwise_also_in_half_precision(block, hidden, latents):
    open_gates(block, attention=0.0, feed_forward=0.0)
    for dtype in (torch.float32, torch.bfloat16):
        out = run(block, hidden.to(dtype), latents)
        assert out.dtype == dtype
        assert torch.equal(out, hidden.to(dtype))


def test_gates_start_where_the_config_says():
    config = FlamingoConfig(gate_init=0.25)
    made = GatedCrossAttentionBlock(config, WIDTH, MEDIA_WIDTH)
    assert (made.attn_gate.item(), made.ff_gate.item()) == (0.25, 0.25)


def test_a_batch_in_which_nobody_sees_an_image_is_legal(block, hidden, latents):
    open_gates(block, attention=2.0, feed_forward=0.0)
    nobody = torch.full_like(SEEN, -1)
    assert torch.equal(run(block, hidden, latents, nobody), hidden)


def test_rows_share_an_image_without_sharing_anything_else(block, hidden, latents):
    """As beams do: each result is that of the row alone."""
    open_gates(block, attention=2.0, feed_forward=1.0)
    seen = torch.zeros_like(SEEN)
    together = run(block, hidden, latents, seen)
    for row in range(len(hidden)):
        alone = run(block, hidden[row : row + 1], latents, seen[:1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-6, rtol=1e-6)


def test_attention_weights_sum_to_one_where_an_image_is_seen_and_are_zero_elsewhere(block, hidden, latents):
    keys, _ = block.attn.project_media(latents)
    weights = block.attention_weights(hidden, keys, Runs.of(SEEN))
    assert weights.shape == (*SEEN.shape, len(latents), LATENTS)
    torch.testing.assert_close(weights.sum(dim=(-2, -1)), (SEEN >= 0).float())
    on_its_own = torch.nn.functional.one_hot(SEEN.clamp_min(0), len(latents)) * (SEEN >= 0)[..., None]
    torch.testing.assert_close(weights.sum(dim=-1), on_its_own.float())
    assert (weights >= 0).all()
