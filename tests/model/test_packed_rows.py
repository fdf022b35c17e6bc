"""Documents that share a row give what they give alone, in every LM that says it packs."""

from __future__ import annotations

import pytest
import torch

IMAGE = 21
# GPT-2 has absolute positions, the others rotary ones.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "mistral": {"sliding_window": 4},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi": {},
    "olmo2": {},
}
# OPT makes a mask of its own, which hides that rows are packed.
CANNOT = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64},
}
DOCUMENTS = ([IMAGE, 5, 6, IMAGE, 7], [8, 9, 10], [11, IMAGE, 12, 13, 14, 15])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_logits_that_they_have_alone(build, pixels, family):
    model = build(family, lm=FAMILIES[family])
    assert model.packs()
    model.double()  # so that rounding hides nothing
    pixels = pixels.double()
    row = torch.tensor([[token for document in DOCUMENTS for token in document] + [0, 0]])
    numbers = [n for n, document in enumerate(DOCUMENTS) for _ in document]
    segments = torch.tensor([[*numbers, -1, -1]])
    with torch.no_grad():
        together = model(input_ids=row, segment_ids=segments, pixel_values=pixels).logits[0]
        start, image = 0, 0
        for document in DOCUMENTS:
            own = pixels[image : image + document.count(IMAGE)]
            alone = model(input_ids=torch.tensor([document]), pixel_values=own, use_cache=False).logits[0]
            found = together[start : start + len(document)]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
            start, image = start + len(document), image + len(own)


@pytest.mark.parametrize("family", CANNOT)
def test_an_lm_that_mixes_what_shares_a_row_says_so(build, family):
    assert not build(family, lm=CANNOT[family]).packs()
