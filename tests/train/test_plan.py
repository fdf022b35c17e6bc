"""Plans against measurement: model states, activations, and the fullest moment, on a CPU."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.data.packing import packed, padded
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train import remade
from flamingo.train.config import Recipe
from flamingo.train.features import FeatureCache
from flamingo.train.objective import Objective
from flamingo.train.optim import adamw
from flamingo.train.parts import add_adapters, unfreeze
from flamingo.train.plan import GIB, Option, _stages, plan, recommend
from flamingo.train.planning.assembly import assemble, bytes_of, configuration, parameters
from flamingo.train.planning.batches import micro_batch
from flamingo.train.planning.memory import Batchwise, States, Tracer, states
from flamingo.train.planning.show import show
from tests.train.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
# The proportions of today's LMs: MLP 3 wide, two queries to a key, a vocabulary that is not small.
LANGUAGE = {
    "model_type": "qwen3",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 576,
    "vocab_size": 4000,
    "tie_word_embeddings": True,
}
RECIPE = {
    "run": "runs/planned",
    "steps": 1000,
    "model": {
        "vision": "timm:test_vit",
        "language": "lm",
        "frozen_dtype": "bfloat16",
        "architecture": {"resampler_latents": 16, "resampler_depth": 3, "cross_attention_every": 2},
    },
    "sources": [
        {"name": "documents", "kind": "obelics", "shards": "a.tar", "batch": 4, "max_tokens": 128},
        {"name": "pairs", "kind": "pairs", "shards": "b.tar", "batch": 8, "max_tokens": 32},
    ],
    "pack_tokens": 256,
    "autocast": "bfloat16",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the LM's config.json, and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LANGUAGE))
    return tmp_path


def recipe_for(folder: Path, **fields: Any) -> Recipe:
    model = {**RECIPE["model"], "language": str(folder), **fields.pop("model", {})}  # type: ignore[dict-item]
    return Recipe.model_validate({**RECIPE, "model": model, **fields})


def real(recipe: Recipe) -> FlamingoForConditionalGeneration:
    """The recipe's model with weights, made as the trainer makes it."""
    model = FlamingoForConditionalGeneration(configuration(recipe))
    for part in (model.language_model, model.vision_encoder):
        part.to(getattr(torch, recipe.model.frozen_dtype))  # type: ignore[union-attr]
    if recipe.lora:
        add_adapters(model, recipe.lora)
    unfreeze(model, recipe, recipe.steps)
    if recipe.activation_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def objective_and_rows(model: FlamingoForConditionalGeneration, recipe: Recipe, images: dict[str, int]):
    batches = []
    for source in recipe.sources:
        batch = micro_batch(source, source.batch, images[source.name], model.config, False, _NoMode())  # type: ignore[arg-type]
        batch.pixel_values.zero_()  # whatever the memory held before
        batches.append(batch)
    image = model.config.image_token_id
    each, most = model.image_tokens, recipe.pack_tokens
    rows = packed(batches, most, image, each) if most else padded(batches)
    weights = {source.name: source.weight for source in recipe.sources}
    cache = FeatureCache(model, 0.0)
    return Objective(model, weights, cache, getattr(torch, recipe.autocast), recipe.z_loss), rows


class _NoMode:
    """In place of torch's FakeTensorMode: pictures with pixels."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


IMAGES = {"documents": 2, "pairs": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"pack_tokens": 0},
    "checkpointing": {"activation_checkpointing": True},
    "float32": {"autocast": "float32", "model": {"frozen_dtype": "float32"}},
    "adapters": {"lora": {"rank": 8}},
    "unfrozen": {"unfreeze": [{"part": "language_model"}]},
    "z-loss": {"z_loss": 1e-3},
    "prefix": {"pack_tokens": 512, "model": {"architecture": {"connector": "mlp", "fusion": "prefix"}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_what_a_real_forward_pass_saves(folder, variant, monkeypatch):
    """Storages of saved tensors, each once, without the weights: within 15 %."""
    recipe = recipe_for(folder, **VARIANTS[variant])
    planned = Tracer(assemble(recipe), recipe, IMAGES).run(1)
    model = real(recipe)
    objective, rows = objective_and_rows(model, recipe, IMAGES)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    def keep_some(tensor: torch.Tensor) -> Any:
        kept = packed_by_training(tensor)
        keep(kept if isinstance(kept, torch.Tensor) else kept[1])
        return kept

    packed_by_training = remade.packed
    monkeypatch.setattr(remade, "packed", keep_some)
    targets = {source.name: 100 for source in recipe.sources}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = objective(rows, targets)
    assert loss.requires_grad
    measured = sum(storage.nbytes() for storage in saved.values())
    print(variant, planned.activations / measured)
    assert planned.activations == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("variant", ["packed", "checkpointing", "float32"])
def test_the_fullest_moment_is_that_of_torchs_own_allocator(folder, variant):
    """Activations and buffers together, against every allocation that the profiler saw: within 15 %."""
    recipe = recipe_for(folder, **VARIANTS[variant])
    planned = Tracer(assemble(recipe), recipe, IMAGES).run(1)
    model = real(recipe)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    objective, rows = objective_and_rows(model, recipe, IMAGES)
    targets = {source.name: 100 for source in recipe.sources}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loss, _ = objective(rows, targets)
        loss.backward()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    pixels = sum(row.pixel_values.untyped_storage().nbytes() for row in rows)  # were there before
    print(variant, (planned.activations + planned.buffers) / (peak + pixels))
    assert planned.activations + planned.buffers == pytest.approx(peak + pixels, rel=0.15)


def test_a_micro_batch_twice_as_large_keeps_about_twice_as_much(folder):
    tracer = Tracer(assemble(recipe_for(folder)), recipe_for(folder), IMAGES)
    whole, half = tracer.run(1), tracer.run(2)
    assert 1.7 < whole.activations / half.activations < 2.0  # weights in half precision stay one
    assert tracer.run(1) == whole  # nothing is left over of a run


def test_what_is_moved_to_the_cpu_has_a_column_where_anything_is(folder):
    for fields, there in (({}, False), ({"zero_stage": 1, "offload": "optimizer"}, True)):
        made = plan(recipe_for(folder, **fields), gpus=2, gpu_memory=80, peak=100)
        show(made, told := io.StringIO())
        assert ("on the CPU" in told.getvalue()) is there
        row = next(line for line in told.getvalue().splitlines() if "<- recommended" in line)
        best = made.recommended
        assert best and (f" {best.states.host / GIB:.2f} " in row.partition("<-")[0][-12:]) is there


def test_a_large_language_model_is_no_part_of_the_first_micro_batch(tmp_path):
    """Its class is asked once how it makes logits, of an LM made for that."""
    large = {**LANGUAGE, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(large))
    recipe = recipe_for(tmp_path)
    tracer = Tracer(assemble(recipe), recipe, IMAGES)
    first = tracer.run(4)
    assert first == tracer.run(4)
    weights = sum(parameter.numel() for parameter in tracer.model.language_model.parameters())
    assert first.activations + first.buffers < 4 * weights  # where it would be seen


@pytest.mark.parametrize("variant", ["packed", "adapters", "unfrozen", "float32"])
def test_states_are_the_bytes_that_model_and_optimizer_hold(folder, variant):
    """After a step of one process, with gradients: within 5 %."""
    recipe = recipe_for(folder, **VARIANTS[variant])
    planned_model = assemble(recipe)
    frozen, trained = parameters(planned_model)
    count = sum(trained.values())
    planned = states(recipe, 0, 1, 1, bytes_of(planned_model, trained=False), count)
    model = real(recipe)
    optimizer = adamw(model, recipe.optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]
    tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert planned.total == pytest.approx(sum(storages.values()), rel=0.05)
    assert sum(p.numel() for p in model.parameters()) == count + sum(frozen.values())


HOLDER = """
import gc, json, sys
from pathlib import Path
import torch
from flamingo.train import engine
from flamingo.train.precision import LossScale
from tests.train.test_plan import recipe_for, real, objective_and_rows, IMAGES

stage, accumulation, offload, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
rank, world = engine.join_group()
small = {"zero_optimization": {"reduce_bucket_size": 1000}}
if stage == 3:
    small["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
recipe = recipe_for(folder, zero_stage=stage, accumulation=accumulation, offload=offload, deepspeed=small,
                    model={"frozen_dtype": "float32"})
torch.manual_seed(0)
objective, rows = objective_and_rows(real(recipe), recipe, IMAGES)
scale = LossScale.of(recipe.autocast)
wrapped = engine.Engine(objective, recipe, world, scale).deepspeed
del objective
for number in range(2 * accumulation - (accumulation > 1)):
    # The last pass stands where the optimizer has its state and the gradients are there.
    loss, _ = wrapped(rows, {"documents": 100, "pairs": 100})
    wrapped.backward(loss)
    del loss
    if number < 2 * accumulation - 1 - (accumulation > 1):
        wrapped.step()
gc.collect()
tensors = [t for row in rows for t in vars(row).values() if isinstance(t, torch.Tensor)]
rows_held = {t.untyped_storage().data_ptr() for t in tensors}
held = {}
for thing in gc.get_objects():
    if isinstance(thing, torch.Tensor) and not thing.is_meta:
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.untyped_storage().data_ptr() not in rows_held:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
if rank == 0:
    print("HELD", sum(held.values()))
engine.leave_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "accumulation", "offload"),
    [(0, 1, "none"), (1, 1, "none"), (1, 2, "none"), (2, 1, "none"), (2, 2, "none"), (3, 1, "none"),
     (2, 1, "optimizer"), (3, 1, "optimizer")],
)  # fmt: skip
def test_states_are_what_deepspeed_holds_on_two_ranks(folder, tmp_path_factory, stage, accumulation, offload):
    """Every tensor of a rank's process in the backward pass of its second step, each storage once."""
    script = tmp_path_factory.mktemp("ranks") / "holder.py"
    script.write_text(HOLDER)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(free_port()),
            str(script),
        ]
        + [str(stage), str(accumulation), offload, str(folder)],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    found = [line for line in run.stdout.splitlines() if line.startswith("HELD")]
    assert found, run.stderr[-2000:]
    settings = {"zero_stage": stage, "accumulation": accumulation, "offload": offload}
    recipe = recipe_for(folder, **settings, model={"frozen_dtype": "float32"})
    model = assemble(recipe)
    frozen, count = bytes_of(model, trained=False), sum(parameters(model)[1].values())
    encoder = bytes_of(model.vision_encoder, trained=False)  # type: ignore[arg-type]
    planned = states(recipe, stage, 2, accumulation, frozen, count, encoder)
    measured = int(found[0].split()[1])
    print(stage, accumulation, offload, (planned.total - planned.buffers + planned.host) / measured)
    assert planned.total - planned.buffers + planned.host == pytest.approx(measured, rel=0.05)


def test_more_of_zero_holds_less_and_offload_moves_it_to_the_host(folder):
    recipe = recipe_for(folder, deepspeed={"zero_optimization": {"reduce_bucket_size": 10}})
    each = [states(recipe, stage, 4, 2, 1000, 500) for stage in range(4)]
    totals = [held.total - held.buffers for held in each]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4
    assert each[1].buffers == 40  # the recipe's own bucket
    moved = states(recipe.model_copy(update={"offload": "optimizer"}), 2, 4, 2, 1000, 500)
    assert moved.gradients == moved.optimizer == 0 and moved.host >= each[2].gradients + each[2].optimizer
    away = states(recipe.model_copy(update={"offload": "all"}), 3, 4, 2, 1000, 500)
    assert away.total == away.buffers
    pieces, kept = (states(recipe, 3, 4, 2, 1000, 500, encoder) for encoder in (0, 400))
    assert (pieces.frozen, kept.frozen) == (250, 400 + 150)  # every rank has the encoder whole


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, {0, 1, 2, 3}),
        ({"offload": "optimizer"}, {1, 2, 3}),
        ({"offload": "all", "zero_stage": 3}, {3}),
        ({"model": {"start": "runs/first/model"}}, {0, 1, 2}),
        ({"unfreeze": [{"part": "vision_encoder"}]}, {0, 1, 2}),
    ],
)
def test_no_stage_is_planned_that_a_training_would_refuse(folder, settings, stages):
    fields = {"zero_stage": 1} if settings.get("offload") == "optimizer" else {}
    assert set(_stages(recipe_for(folder, **fields, **settings))) == stages


def option(stage: int, accumulation: int, fits: bool) -> Option:
    return Option(stage, accumulation, 1, States(0, 0, 0, 0, 0, 0), Batchwise(0, 0), fits)


def test_the_largest_micro_batch_is_recommended_and_zero_3_last():
    choices = [
        option(3, 1, True),
        option(0, 2, True),
        option(2, 2, True),
        option(1, 4, True),
        option(0, 1, False),
    ]
    assert recommend(choices) is choices[1]
    assert recommend([option(3, 2, True), option(2, 4, True)]).zero_stage == 2  # type: ignore[union-attr]
    assert recommend([option(3, 2, True), option(2, 4, False)]).zero_stage == 3  # type: ignore[union-attr]
    assert recommend([option(0, 1, False)]) is None


def test_a_plan_adds_up(folder):
    made = plan(recipe_for(folder), gpus=2, gpu_memory=80, utilisation=0.5, peak=100)
    assert made.held.tokens == 4 * 128 + 8 * 32 and made.held.images == 4 * 2 + 8
    assert made.step_seconds == pytest.approx(made.flops / (2 * 100e12 * 0.5))
    assert made.gpu_hours == pytest.approx(made.step_seconds * 1000 * 2 / 3600)
    assert made.recommended and made.recommended.accumulation == 1 and made.recommended.documents == 6
    assert {o.accumulation for o in made.options} == {1, 2} and {o.zero_stage for o in made.options} == {
        0,
        1,
        2,
        3,
    }
    again = plan(recipe_for(folder, activation_checkpointing=True), gpus=2, gpu_memory=80, peak=100)
    assert again.flops == made.flops and again.recomputed > 0.2 * made.flops


def test_where_nothing_fits_the_plan_says_what_helps(folder):
    made = plan(recipe_for(folder), gpus=2, gpu_memory=0.05)
    assert made.recommended is None
    assert {o.accumulation for o in made.options} == {2}  # larger micro-batches fit no better
    assert any("offload" in way for way in made.advice)
    assert all(not o.fits for o in made.options)


def test_stored_features_leave_the_encoder_out(folder):
    with_encoder = plan(recipe_for(folder), gpus=1, gpu_memory=80)
    stored = plan(recipe_for(folder, features="features"), gpus=1, gpu_memory=80)
    assert stored.flops < with_encoder.flops and stored.held.pictures == 0


@pytest.fixture
def recipe_path(folder, tmp_path):
    path = tmp_path / "planned.yaml"
    path.write_text(json.dumps(recipe_for(folder).model_dump(mode="json")))
    return path


def test_the_command_prints_plain_lines_in_a_pipe(recipe_path):
    result = CliRunner().invoke(
        app, ["plan", str(recipe_path), "steps=500", "--gpus", "2", "--gpu-memory", "24", "--peak", "100"]
    )
    assert result.exit_code == 0, result.output
    assert "recommended: zero_stage=0 accumulation=1" in result.output and "\x1b" not in result.output
    assert "500 steps" in result.output and "GPU-hours" in result.output
    rows = [line for line in result.output.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]
    assert len(rows) == 8 and sum("recommended" in row for row in rows) == 1


def test_other_warnings_are_heard_after_the_command(recipe_path, caplog):
    CliRunner().invoke(app, ["plan", str(recipe_path)])
    logging.getLogger("flamingo.anything").warning("damaged image")
    assert "damaged image" in caplog.text


def test_the_command_gives_json(recipe_path):
    result = CliRunner().invoke(
        app, ["plan", str(recipe_path), "--images", "documents=4", "--json", "--utilisation", "0.3"]
    )
    fields = json.loads(result.output)
    assert fields["images"] == {"documents": 4, "pairs": 1} and fields["utilisation"] == 0.3
    best = fields["recommended"]
    assert best["total"] == sum(best["states"].values()) - best["states"]["host"] + sum(
        best["batch"].values()
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "3"], "3 ranks do not divide"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpu-memory", "0"], "--gpu-memory 0"),
        (["--gpu-memory", "nan"], "--gpu-memory nan"),
        (["--peak", "nan"], "--peak nan"),
        (["--peak", "inf"], "--peak inf"),
        (["--utilisation", "1.2"], "--utilisation 1.2"),
        (["--peak", "-1"], "--peak -1"),
        (["--images", "photos=3"], "no such source; there are documents, pairs"),
        (["--images", "documents=128"], "128 tokens"),
        (["--images", "documents"], "SOURCE=N"),
        (["model.language=nobody/knows-this"], "nobody/knows-this.*hf download"),
        (["model.vision=timm"], "source:name"),
        (["model.vision=tim:x"], "tim.*timm"),
        (["model.architecture.gate_intit=1"], "gate_intit"),
        (["lora={target_modules: [nothing]}"], "nothing"),
        (["stpes=1"], "steps"),
    ],
)
def test_what_cannot_be_planned_is_one_message(recipe_path, monkeypatch, arguments, words):
    found = AutoConfig.from_pretrained

    def offline(name: str, **more: Any):
        if Path(name).is_dir():
            return found(name, **more)
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    result = CliRunner().invoke(app, ["plan", str(recipe_path), *arguments])
    assert result.exit_code != 0
    assert re.search(words, " ".join(result.output.split())), result.output
    assert "Traceback" not in result.output


def test_nothing_of_the_size_of_weights_is_allocated(tmp_path):
    """Qwen3-8B on a machine that could not hold it."""
    large = {
        **LANGUAGE,
        "hidden_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "head_dim": 128,
    }
    large |= {"num_key_value_heads": 8, "intermediate_size": 12288, "vocab_size": 151936}
    (tmp_path / "config.json").write_text(json.dumps(large))
    recipe = recipe_for(tmp_path, steps=1)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        made = plan(recipe, gpus=4, gpu_memory=80)
    assert sum(made.frozen.values()) > 1e9
    largest = max(e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    assert largest < 50e6
