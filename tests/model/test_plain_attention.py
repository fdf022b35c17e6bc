"""On a CPU the LM attends by plain products: the same figures as by torch's own attention."""

from __future__ import annotations

import pytest
import torch

from flamingo.attention import NAME, attend_plainly, plain_attention

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
