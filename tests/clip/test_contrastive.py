"""Contrastive training: open_clip's losses, ranks, order, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from open_clip.loss import ClipLoss, SigLipLoss
from torch.nn import functional

from flamingo.data.errors import TooManyBadSamples
from flamingo.data.stream import Stream
from flamingo.train.contrastive.config import EncoderConfig, read_recipe
from flamingo.train.contrastive.data import Pairs, numbers_of
from flamingo.train.contrastive.encoder import build
from flamingo.train.contrastive.held_out import recall
from flamingo.train.contrastive.loop import groups
from flamingo.train.contrastive.loss import Contrastive
from flamingo.train.contrastive.session import open_pairs
from tests.clip.contrastive import (
    MODEL,
    asked_to_stop,
    fields,
    gradients,
    pair,
    recipe,
    records,
    refused,
    run_each,
    run_through,
    write_pairs,
)
from tests.end_to_end.conftest import run_cli
from tests.train.ranks import in_ranks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.tar", 60)
    return tmp_path


# ---- losses --------------------------------------------------------------------------------------


def features(pairs: int, width: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    images, texts = (functional.normalize(torch.randn(pairs, width), dim=-1) for _ in range(2))
    return {"image_features": images, "text_features": texts, "logit_scale": torch.tensor(7.0)}


@pytest.mark.parametrize("equal", ["match", "differ"])
def test_where_all_captions_differ_the_losses_are_those_of_open_clip(equal):
    given, captions = features(6), torch.arange(6)
    plain = ClipLoss()(given["image_features"], given["text_features"], given["logit_scale"])
    torch.testing.assert_close(Contrastive("clip", equal)(given, captions), plain)
    given["logit_bias"] = torch.tensor(-2.0)
    plain = SigLipLoss()(
        given["image_features"], given["text_features"], given["logit_scale"], given["logit_bias"]
    )
    torch.testing.assert_close(Contrastive("siglip", equal)(given, captions), plain)


def test_equal_captions_are_right_for_all_their_pictures():
    """Worked out by hand: of three pairs, the first and the last say the same."""
    given, captions = features(3), torch.tensor([5, 8, 5])
    logits = 7 * given["image_features"] @ given["text_features"].T
    shares = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    both = [-(shares * side.log_softmax(1)).sum(1).mean() for side in (logits, logits.T)]
    torch.testing.assert_close(Contrastive("clip", "match")(given, captions), (both[0] + both[1]) / 2)
    given["logit_bias"] = torch.tensor(-1.0)
    signs = 2 * (shares > 0).float() - 1
    expected = -functional.logsigmoid(signs * (logits - 1)).sum() / 3
    torch.testing.assert_close(Contrastive("siglip", "match")(given, captions), expected)


def test_equal_captions_do_not_push_their_pictures_about():
    same = torch.tensor([4, 4])
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    given = {"image_features": image, "text_features": image.detach(), "logit_scale": torch.tensor(9.0)}
    Contrastive("clip", "match")(given, same).backward()
    assert image.grad is not None and image.grad.abs().max() < 1e-6


def test_the_right_text_of_a_picture_may_be_that_of_another_picture():
    given = features(4)
    given["text_features"] = given["image_features"].roll(1, 0)  # each is nearest to the next one's text
    assert Contrastive("clip", "match").right(given, torch.tensor([1, 1, 2, 3])) == 1
    assert Contrastive("clip", "match").right(given, torch.tensor([1, 1, 1, 1])) == 4


def test_recall_counts_first_guesses_in_both_directions():
    images = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    told = recall(images, texts, torch.tensor([0, 0, 1]))
    assert told.image_to_text == pytest.approx(2 / 3) and told.text_to_image == 1 and told.chance == 0.5


# ---- ranks and order -------------------------------------------------------------------------------


def test_gradients_of_two_ranks_are_those_of_one(folder):
    """Six captions in a batch of eight, so that equal ones lie on different ranks."""
    given = [
        fields(folder, loss=loss, equal_captions=equal)
        for loss in ("clip", "siglip")
        for equal in ("match", "differ")
    ]
    (one,) = in_ranks(1, folder / "1", gradients, given)
    for other in in_ranks(2, folder / "2", gradients, given):
        for alone, shared in zip(one, other, strict=True):
            for name, value in alone.items():
                torch.testing.assert_close(shared[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_the_pairs_of_a_step_do_not_depend_on_the_ranks(folder):
    made = recipe(folder, data__augment={"crop_scale": [0.5, 1.0], "flip": 0.5})
    encoder = build(made.model, made.loss)
    for step in (0, 11):  # the second in another epoch
        (whole,), halves, quarters = (
            [open_pairs(made, encoder, rank, world)[step] for rank in range(world)] for world in (1, 2, 4)
        )
        for parts in (halves, quarters):
            assert torch.equal(torch.cat([part.pixel_values for part in parts]), whole.pixel_values)
            assert torch.equal(torch.cat([part.captions for part in parts]), whole.captions)


def test_captions_have_equal_numbers_where_the_tokenizer_reads_them_alike():
    tokenize = open_clip.get_tokenizer("ViT-B-32", context_length=8)
    one, two, three = numbers_of(tokenize(["A red square", "a  red SQUARE ", "a blue square"])).tolist()
    assert one == two != three


# ---- runs ------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_unbroken_one_also_on_another_number_of_ranks(folder):
    """What is drawn at random in a step (dropped patches), and statistics of batches, are part of it."""
    dropping = {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], "patch_dropout": 0.5}}
    residual = {**MODEL, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
    given = [
        fields(folder, model=dropping),
        fields(folder, run=str(folder / "plain")),
        fields(folder, run=str(folder / "residual"), model=residual),
    ]
    whole = in_ranks(2, folder / "whole", run_each, given)[0]
    halves = [half_done(one, f"{one['run']}-again") for one in given]
    again = in_ranks(2, folder / "again", run_each, halves, True)[0]
    for (told, weights), (more, same) in zip(whole, again, strict=True):
        assert [record["loss"] for record in more] == [record["loss"] for record in told]
        assert all(torch.equal(same[name], value) for name, value in weights.items())
    assert whole[2][1]["visual.bn1.num_batches_tracked"] == 6
    alone = half_done(given[1], f"{given[1]['run']}-alone")
    ((more, _),) = in_ranks(1, folder / "alone", run_through, alone, True)
    losses = [record["loss"]["contrastive"] for record in more]
    assert losses == pytest.approx([record["loss"]["contrastive"] for record in whole[1][0]], abs=1e-4)


def half_done(given: dict[str, Any], run: str) -> dict[str, Any]:
    """A copy of a finished run as it was after its checkpoint of step 3, and its recipe."""
    shutil.copytree(given["run"], run)
    shutil.rmtree(Path(run) / "checkpoints" / "step-000006")
    shutil.rmtree(Path(run) / "model")
    return {**given, "run": run}


def test_a_run_records_what_it_does_and_its_scale_stays_within_its_limit(folder):
    validation = {"shards": str(folder / "pairs.tar"), "every": 3, "limit": 30, "batch": 7}
    made = fields(folder, validation=validation, optimizer__lr=0.5, steps=12)
    told, weights = in_ranks(2, folder / "out", run_through, made)[0]
    assert [record["step"] for record in told] == list(range(1, 13))
    for record in told:
        assert {"loss", "accuracy", "logit_scale", "lr", "grad_norm", "samples_per_second"} <= record.keys()
        assert record["logit_scale"] <= 100.001 and 0 <= record["accuracy"] <= 1
    assert weights["logit_scale"] <= torch.tensor(100.0).log() + 1e-5
    scored = [record["scores"] for record in told if "scores" in record]
    assert len(scored) == 4
    assert scored[-1]["pictures"] == 30 and scored[-1]["captions"] == 6
    assert scored[-1]["chance"] == pytest.approx(1 / 6)
    assert json.loads((Path(made["run"]) / "train.json").read_text())["held_out"] == scored[-1]


def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint(folder):
    why = in_ranks(1, folder / "out", asked_to_stop, fields(folder))[0]
    assert "stopped after step 1" in why and "SIGTERM" in why
    assert (folder / "run" / "checkpoints" / "step-000001" / "manifest.json").exists()
    assert json.loads((folder / "run" / "stopped.json").read_text())["step"] == 1
    told, _ = in_ranks(1, folder / "again", run_through, fields(folder), True)[0]
    assert [record["step"] for record in told] == [1, 2, 3, 4, 5, 6]


def test_the_command_ends_with_status_75_where_its_time_is_up_and_goes_on(folder):
    """Two ranks under the launcher; the second time they are given time."""
    given = folder / "tiny.yaml"
    given.write_text(yaml.safe_dump(fields(folder)))
    stopped = run_cli("clip", "train", given, "wall_minutes=0.001", "--processes", "2")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "stopped after step 1, with a checkpoint: wall_minutes" in stopped.stderr
    done = run_cli("clip", "train", given, "--resume", "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in records(folder / "run")] == [1, 2, 3, 4, 5, 6]
    wrong = run_cli("clip", "train", given, "stepz=3")
    assert wrong.returncode == 1 and "unknown key stepz; did you mean 'steps'?" in wrong.stderr


def test_a_locked_image_tower_keeps_its_weights_and_the_texts_learn(folder):
    first = fields(folder, run=str(folder / "first"))
    _, before = in_ranks(1, folder / "1", run_through, first)[0]
    locked = {"name": str(folder / "first" / "model"), "lock_image": True}
    _, after = in_ranks(2, folder / "2", run_through, fields(folder, model=locked))[0]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and not [name for name in changed if name.startswith("visual.")]


def test_a_run_goes_on_only_with_the_weights_that_its_lock_keeps(folder):
    in_ranks(1, folder / "1", run_through, fields(folder, run=str(folder / "first")))
    given = fields(folder, model={"name": str(folder / "first" / "model"), "lock_image": True})
    in_ranks(1, folder / "2", run_through, given)
    in_ranks(1, folder / "3", run_through, fields(folder, run=str(folder / "other"), seed=1))
    again = half_done(given, str(folder / "again"))
    shutil.copytree(folder / "other" / "model", folder / "first" / "model", dirs_exist_ok=True)
    with pytest.raises(
        AssertionError, match=r"model\.name: the weights are not those that .*again began with"
    ):
        in_ranks(1, folder / "4", run_through, again, True)


def test_decay_acts_on_matrices_only():
    model: Any = build(EncoderConfig.model_validate(MODEL), "siglip").model
    decayed, spared = groups(model, 0.2)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.2 and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    kept = {names[id(p)] for p in spared["params"]}
    assert {"logit_scale", "logit_bias", "positional_embedding", "visual.positional_embedding"} <= kept
    assert {names[id(p)] for p in decayed["params"]} >= {"token_embedding.weight", "visual.conv1.weight"}


# ---- bad input -------------------------------------------------------------------------------------


def test_bad_pairs_are_replaced_and_told(folder):
    picture = {"png": b"no picture", "txt": b"a red square"}
    silent = {"png": pair(5)["png"]}
    write_pairs(folder / "pairs.tar", 24, {3: picture, 5: silent, 7: {"txt": b"alone"}})
    validation = {"shards": str(folder / "pairs.tar")}
    told, _ = in_ranks(2, folder / "out", run_through, fields(folder, validation=validation))[0]
    faults: dict[str, int] = {}
    for record in told:
        for fault, count in record.get("faults", {}).items():
            faults[fault] = faults.get(fault, 0) + count
    assert faults.keys() == {"damaged image", "missing member"} and sum(faults.values()) >= 6
    listed = [json.loads(line) for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"][-4:] for line in listed} == {"0003", "0005", "0007"}
    assert told[-1]["scores"]["pictures"] == 21 and told[-1]["scores"]["left_out"] == 3


def test_shards_without_a_single_good_pair_are_refused(folder):
    write_pairs(folder / "pairs.tar", 4, {n: {"txt": b"alone"} for n in range(4)})
    made = recipe(folder)
    encoder = build(made.model, made.loss)
    with pytest.raises(TooManyBadSamples, match="missing member"):
        open_pairs(made, encoder, 0, 1)[0]


def test_what_cannot_be_trained_is_refused_by_all_ranks_in_the_same_words(folder):
    given = [
        (fields(folder, data__batch=7), "data.batch=7 cannot be divided by 2 ranks: set it to 6 or 8"),
        (fields(folder, data__shards=str(folder / "none-*.tar")), "none-*.tar"),
        (fields(folder, validation={"shards": str(folder / "none.tar")}), "validation: "),
        (fields(folder, optimizer__lr=1e30, optimizer__warmup_steps=0), "lower optimizer.lr"),
    ]
    words = in_ranks(2, folder / "out", refused, [one for one, _ in given])
    for number, (_, expected) in enumerate(given):
        for rank in (0, 1):
            assert expected in words[rank][number], words[rank][number]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "ViT-Q-7"}, "ViT-Q-7.*no such architecture"),
        ({"name": "ViT-B-32/nobodys"}, "nobodys"),
        ({"name": "tests/clip"}, "no open_clip_config.json"),
        ({**MODEL, "vision_cfg": {"wdith": 4}}, "wdith"),
        ({**MODEL, "text_cfg": {"vocab_size": 100}}, "vocab_size=100"),
        ({"name": "coca_ViT-B-32"}, "coca_ViT-B-32.*also writes captions"),
        ({"name": "ViT-B-32", "lock_image": True}, "random weights"),
    ],
)
def test_a_model_that_open_clip_cannot_make_is_refused(model, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ValueError, match=message):
        build(EncoderConfig.model_validate(model), "clip")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr; did you mean 'lr'"),
        ("data.augmnt={}", "unknown key data.augmnt; did you mean 'augment'"),
        ("data.augment={flop: 1}", "unknown key data.augment.flop; did you mean 'flip'"),
        ("loss=cosine", "'clip' or 'siglip'"),
        ("model.name=ViT-B-32", "give a name, or sizes of a new model"),
        ("model={embed_dim: 8}", "needs a name, or all of embed_dim, vision_cfg, text_cfg"),
        ("model.lock_text=true", "a new model has no weights to keep"),
        ("model.image_size=32", "image_size is for a named model"),
        ("model.text_cfg.hf_model_name=roberta-base", "text_cfg.hf_model_name"),
        ("model={name: ViT-B-32/openai, lock_image: true, lock_text: true}", "nothing would be left"),
        ("data.batch=1", "data.batch"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(override, message):
    path = Path(__file__).parents[2] / "train" / "contrastive" / "recipes" / "easy-vqa.yaml"
    assert read_recipe(path).loss == "clip"
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        read_recipe(path, [override])


def test_a_folder_of_another_run_is_left_alone(folder):
    """Whoever resumes must mean the same run; another kind of run is not one."""
    in_ranks(1, folder / "out", run_through, fields(folder, steps=1, checkpoint_every=0))
    others = [fields(folder, steps=1), fields(folder, steps=2)]
    words = in_ranks(1, folder / "refused", refused, others)[0]
    assert all("holds a run already" in told for told in words)
    assert records(folder / "run")[0]["step"] == 1


def test_a_stream_is_shared_out_whatever_reads_it(folder):
    made = recipe(folder)
    encoder = build(made.model, made.loss)
    stream = Stream(made.data.source(), made.seed)
    pairs = Pairs(stream, encoder.transform, encoder.tokenizer, 60)
    epoch = pairs[0]
    assert len(set(epoch.captions.tolist())) == 6 and len(epoch.input_ids) == 60
    with pytest.raises(ValueError, match=r"data\.batch=3 cannot be divided by 4 ranks: set it to 4"):
        Pairs(stream, encoder.transform, encoder.tokenizer, 3, 0, 4)
