"""On a CPU the LM attends by plain products: the same figures as by torch's own attention."""

from __future__ import annotations

import pytest
import torch

from flamingo.attention import NAME, attend_plainly, plain_attention
from flamingo.attention_products import Attention, all_at_once, attend, in_parts

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing changes on an accelerator")


@cpu
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_logits_and_text_stay_the_same(build, pixels, family, heads):
    if family == "gpt2" and heads != 4:
        pytest.skip("its heads share no keys")
    lm = {} if family == "gpt2" else {"num_key_value_heads": heads}
    model = build(family, lm=lm)
    i = model.config.image_token_id
    rows, mask = torch.tensor([[0, 0, i, 5, 6], [4, i, 7, i, 9]]), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0

    def run():
        logits = model(rows, attention_mask=mask, pixel_values=pixels[:3]).logits
        text = model.generate(
            rows, attention_mask=mask, pixel_values=pixels[:3], max_new_tokens=5, do_sample=False
        )
        return logits[mask.bool()], text

    before, text = run()
    attend_plainly(model.language_model)
    assert model.language_model.config._attn_implementation == NAME
    after, same = run()
    torch.testing.assert_close(after, before, **CLOSE)
    assert same.tolist() == text.tolist()


@cpu
def test_packed_documents_stay_apart(build):
    model = build()
    attend_plainly(model.language_model)
    assert model.packs()


@cpu
def test_what_does_not_use_torchs_attention_stays_as_it_is(build):
    lm = build().language_model
    lm.set_attn_implementation("eager")
    attend_plainly(lm)
    assert lm.config._attn_implementation == "eager"


def test_what_it_cannot_compute_is_refused():
    x = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="softcap"):
        plain_attention(torch.nn.Identity(), x, x, x, None, softcap=5.0)


def test_a_saved_model_does_not_ask_for_it(build, tmp_path):
    model = build()
    attend_plainly(model.language_model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def masked(batch: int, queries: int, keys: int, padding: int, causal: bool = True) -> torch.Tensor:
    """float[B, 1, T, C]; the first row begins with so many padded columns."""
    sees = torch.ones(batch, queries, keys, dtype=torch.bool)
    if causal:
        sees = sees.tril(keys - queries)
    sees[0, :, :padding] = False
    mask = torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)
    return mask[:, None]


@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (64, 64), (150, 150), (70, 200), (3, 90)])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_reading_without_gradients_gives_the_same(queries, keys, heads):
    """Parts of the queries, with the keys up to their end: also after a cache, and with padding."""
    drawn = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 8, generator=drawn)
    k, v = (torch.randn(2, heads, keys, 8, generator=drawn) for _ in range(2))
    mask = masked(2, queries, keys, padding=1)
    with torch.no_grad():
        found, weights = plain_attention(torch.nn.Identity(), q, k, v, mask)
    learned, _ = plain_attention(torch.nn.Identity(), q.clone().requires_grad_(), k, v, mask)
    assert weights is None and learned.requires_grad
    real = slice(max(0, 1 - (keys - queries)), None)  # a padded query sees nothing: any values
    torch.testing.assert_close(found[:, real], learned[:, real].detach(), **CLOSE)


def test_rows_that_see_what_comes_after_are_not_cut():
    q, k, v = (torch.randn(1, 2, 100, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = masked(1, 100, 100, padding=0, causal=False)
    with torch.no_grad():
        found, _ = plain_attention(torch.nn.Identity(), q, k, v, mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_dropout_is_done_where_nothing_is_learned():
    q, k, v = (torch.randn(1, 2, 10, 8) for _ in range(3))
    module, mask = torch.nn.Identity().train(), masked(1, 10, 10, padding=0)
    with torch.no_grad():
        one, other = (plain_attention(module, q, k, v, mask, dropout=0.5)[0] for _ in range(2))
        assert not torch.equal(one, other)
        calm = [plain_attention(module.eval(), q, k, v, mask, dropout=0.5)[0] for _ in range(2)]
        assert torch.equal(*calm)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_images_has_the_figures_and_gradients_of_torchs(masked, dtype):
    """bfloat16: under autocast, against float32."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, generator=drawn).requires_grad_() for n in (5, 7, 7))
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    mask = mask if masked else None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = attend(q, k, v, mask)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    theirs = theirs.transpose(1, 2).flatten(2)
    close = CLOSE if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), theirs, **close)
    wanted = torch.randn(theirs.shape, generator=drawn)
    grads = [torch.autograd.grad((x.float() * wanted).sum(), (q, k, v)) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_the_shares_of_parts_are_added_up_in_the_precision_that_they_have():
    torch.manual_seed(0)
    query = torch.randn(1, 2, 3, 9, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.full((1, 1, 9, 9), -1e9, dtype=torch.float64).triu(1)
    grads = []
    for parts in (in_parts(9, 9, 2), all_at_once(9, 9)):
        out, _ = Attention.apply(query, key, value, mask, parts)  # type: ignore[misc]
        grads.append(torch.autograd.grad(out.square().sum(), [query, key, value]))
    assert len(in_parts(9, 9, 2)) == 5
    for found, other in zip(*grads, strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=1e-13)
