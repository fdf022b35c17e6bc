"""transformers' Trainer, adapters of PEFT, weights of 8 bits, and parts that train on request."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor

ALWAYS = ("resampler.", "gated_blocks.", "added_tokens.")


def changed(model, before: dict) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def step(model, ids, pixels) -> dict:
    """One large step of an optimizer over all parameters; what the weights were."""
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.train()(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    optimizer.step()
    return before


def test_dropout_of_adapters_follows_the_mode_whoever_changes_it(build, ids, pixels):
    """An evaluation between two steps of training switches it off, and on again."""
    peft = pytest.importorskip("peft")
    model = build("llama")
    lora = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model.language_model)
    with torch.no_grad():
        for _ in range(2):
            still = [model.eval()(input_ids=ids, pixel_values=pixels).logits for _ in range(2)]
            drawn = [model.train()(input_ids=ids, pixel_values=pixels).logits for _ in range(2)]
            assert torch.equal(*still) and not torch.equal(*drawn)


# -- Trainer -----------------------------------------------------------------------------


@pytest.fixture
def collate(model, seeing_tokenizer):
    """(picture, text) pairs -> a batch with labels on the words."""
    processor = FlamingoProcessor.for_model(model.config, seeing_tokenizer)

    def collate(samples: list[dict]) -> dict:
        texts = [f"<image>{s['text']}<|endofchunk|>" for s in samples]
        batch = processor(text=texts, images=[s["image"] for s in samples], padding_side="right")
        ids = batch["input_ids"]
        hidden = (batch["attention_mask"] == 0) | (ids == processor.image_token_id)
        return {**batch, "labels": ids.masked_fill(hidden, -100)}

    return collate


def trainer(model, collate, folder, **options) -> Trainer:
    colours = ["red", "green", "blue", "white"]
    texts = ["a b", "c", "d e f", "g"]
    samples = [
        {"image": Image.new("RGB", (40, 30), c), "text": t} for c, t in zip(colours, texts, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        **{"save_strategy": "no", "disable_tqdm": True, **options},
    )
    return Trainer(model, arguments, train_dataset=samples, data_collator=collate)  # type: ignore[arg-type]


@pytest.mark.parametrize("recomputing", [False, True])
def test_the_trainer_changes_the_trained_parts_only(build, collate, tmp_path, recomputing):
    model = build()
    before = weights(model)
    trainer(model, collate, tmp_path, gradient_checkpointing=recomputing).train()
    assert changed(model, before) == {n for n, _ in model.named_parameters() if n.startswith(ALWAYS)}


def test_what_the_trainer_saves_can_be_loaded_and_gone_on_with(build, collate, tmp_path):
    model = build()
    trainer(model, collate, tmp_path, save_strategy="steps", save_steps=2).train()
    back = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    assert not changed(back, weights(model))
    longer = trainer(build(), collate, tmp_path, save_strategy="no")
    longer.args.max_steps = 3
    assert longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 3


# -- parts that train on request ---------------------------------------------------------

GROUPS = {
    "language_model": ("language_model.",),
    "vision_encoder": ("vision_encoder.",),
    "embeddings": ("language_model.model.embed_tokens.", "language_model.lm_head."),
}


@pytest.mark.parametrize("part", GROUPS)
def test_an_unfrozen_part_learns_and_no_other(build, ids, pixels, part):
    model = build()
    model.unfreeze(part)
    before = step(model, ids, pixels)
    expected = {n for n, _ in model.named_parameters() if n.startswith((*ALWAYS, *GROUPS[part]))}
    names = changed(model, before) & {name for name, _ in model.named_parameters()}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad} == expected
    trained = {p for module in model.trained_modules().values() for p in module.parameters()}
    assert trained == {p for p in model.parameters() if p.requires_grad}


BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


def test_statistics_of_a_trained_encoder_stay_what_they_are(build, ids, pixels):
    """Each rank would have its own, and no checkpoint has them."""
    model = build()
    model.unfreeze("vision_encoder")
    before = step(model, ids, pixels)
    buffers = {name for name, _ in model.named_buffers()} & before.keys()
    assert any("running_mean" in name for name in buffers) and not changed(model, before) & buffers
    assert any("vision_encoder" in name for name in changed(model, before))


def test_unfrozen_parts_follow_train_and_eval_and_the_others_do_not(build):
    model = build()
    model.unfreeze("vision_encoder")
    assert model.train().vision_encoder.training and not model.language_model.training
    assert not model.eval().vision_encoder.training
    model.unfreeze("language_model")
    assert all(module.training for module in model.train().modules() if not isinstance(module, BATCH_NORM))
    model.freeze()
    assert not any(m.training for p in (model.vision_encoder, model.language_model) for m in p.modules())
    assert set(model.trained_modules()) == {"resampler", "gated_blocks", "added_tokens"}


def test_several_parts_are_counted_once(build):
    model = build(lm={"tie_word_embeddings": True})
    model.unfreeze("embeddings")
    assert "output_embeddings" not in model.trained_modules()
    model.unfreeze("language_model", "vision_encoder")
    everything = [p for module in model.trained_modules().values() for p in module.parameters()]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def test_a_loaded_model_is_frozen_whatever_the_saved_one_was(build, tmp_path):
    model = build()
    model.unfreeze("language_model", "vision_encoder", "embeddings")
    model.save_pretrained(tmp_path)
    back = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {
        n for n, _ in back.named_parameters() if n.startswith(ALWAYS)
    }
    back.unfreeze("embeddings")
    assert back.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("parts", [("encoder",), ("language_model", "resampler"), ()])
def test_other_names_are_refused_with_those_there_are(build, parts):
    with pytest.raises(ValueError, match="choose from language_model, vision_encoder, embeddings"):
        build().unfreeze(*parts)


# -- PEFT --------------------------------------------------------------------------------


@pytest.fixture
def adapted(build):
    peft = pytest.importorskip("peft")
    targets = r"language_model\..*\.(q_proj|v_proj)"
    return peft.get_peft_model(
        build(), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["added_tokens"])
    )


def test_lora_on_the_lm_trains_the_adapter_and_what_is_saved_with_it(adapted, ids, pixels):
    before = weights(adapted)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
    for _ in range(2):  # the adapters' second matrix starts at zero
        optimizer.zero_grad()
        adapted.train()(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        optimizer.step()
    names = changed(adapted, before)
    assert names and all("lora_" in n or "modules_to_save" in n for n in names)
    assert sum("lora_B" in n for n in names) == sum("lora_A" in n for n in names) == 8
    assert {n.split("modules_to_save.")[1] for n in names if "added_tokens" in n} == {
        "default.input",
        "default.output",
    }


def test_an_adapter_is_saved_loaded_and_writes(adapted, build, ids, pixels, tmp_path):
    import peft

    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    write = {"pixel_values": pixels, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    adapted.eval()
    written = adapted.generate(input_ids=ids, **write)
    adapted.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    assert torch.equal(back.generate(input_ids=ids, **write), written)
    assert not torch.equal(build().generate(input_ids=ids, **write), written)
    with torch.no_grad():
        plain, with_adapter = (m(input_ids=ids, pixel_values=pixels).logits for m in (build(), back))
        merged = back.merge_and_unload()(input_ids=ids, pixel_values=pixels).logits
    assert not torch.allclose(plain, with_adapter)
    torch.testing.assert_close(merged, with_adapter, atol=1e-4, rtol=1e-4)


def test_gated_blocks_can_be_trained_beside_an_adapter(build, ids, pixels):
    peft = pytest.importorskip("peft")
    model = build()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r"language_model\..*\.q_proj"))
    for module in model.trained_modules().values():  # PEFT froze them
        module.requires_grad_(True)
    before = weights(adapted)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
    adapted.train()(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    optimizer.step()
    names = changed(adapted, before)
    assert any("lora_" in n for n in names) and any("gated_blocks" in n for n in names)


# -- 8 bits ------------------------------------------------------------------------------


def test_an_lm_of_8_bits_writes_nearly_the_same_and_lets_the_rest_learn(build, ids, pixels):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

    model = build(lm={"initializer_range": 0.1})
    with torch.no_grad():
        full = model(input_ids=ids, pixel_values=pixels).logits
        quantize_(model.language_model, Int8WeightOnlyConfig())
        rounded = model(input_ids=ids, pixel_values=pixels).logits
    held = [p for _, p in model.language_model.named_parameters() if isinstance(p, Int8Tensor)]
    assert len(held) == 4 * 7 + 1 and 0 < (rounded - full).norm() < 0.02 * full.norm()
    model.train()(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    assert model.gated_blocks[0].attn_gate.grad.any() and model.resampler.latents.grad.any()


def test_a_folder_loads_with_an_lm_of_8_bits(build, ids, pixels, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = build(lm={"initializer_range": 0.1})
    model.save_pretrained(tmp_path)
    kept = ["resampler", "gated_blocks", "vision_encoder", "lm_head"]
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    back = FlamingoForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    rounded = {n.split(".")[0] for n, p in back.named_parameters() if isinstance(p, Int8Tensor)}
    assert rounded == {"language_model"}
    with torch.no_grad():
        full, found = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, back))
    assert (found - full).norm() < 0.02 * full.norm()
