"""Text and pictures -> what the model takes, exactly as in training."""

from __future__ import annotations

import io

import PIL.Image
import pytest
import torch

from flamingo.config import ADDED_TOKENS
from flamingo.data.transforms import ImageTransform
from flamingo.processing import FlamingoImageProcessor, FlamingoProcessor

END_OF_CHUNK, IMAGE = ADDED_TOKENS


@pytest.fixture
def processor(model, seeing_tokenizer) -> FlamingoProcessor:
    return FlamingoProcessor.for_model(model.config, seeing_tokenizer)


def picture(seed: int, size=(50, 30)) -> PIL.Image.Image:
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return PIL.Image.fromarray(pixels.byte().numpy())


def test_text_and_pictures_become_what_the_model_takes(model, processor):
    batch = processor(
        text=[f"{IMAGE} a b {END_OF_CHUNK}", "c"],
        images=[picture(0)],
    )
    config = model.config
    assert batch["input_ids"].tolist() == [
        [config.image_token_id, 3, 4, config.end_of_chunk_token_id],
        [0, 0, 0, 5],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    model(**batch)


def test_rows_are_padded_on_the_left_whatever_the_tokenizer_prefers(processor):
    processor.tokenizer.padding_side = "right"
    assert processor(text=["a", "a b"])["input_ids"].tolist() == [[0, 3], [3, 4]]
    right = processor(text=["a", "a b"], padding_side="right")
    assert right["input_ids"].tolist() == [[3, 0], [3, 4]]


def test_pictures_are_transformed_as_in_training(model, processor):
    vision = model.config.vision_config
    transform = ImageTransform(vision.image_size, tuple(vision.mean), tuple(vision.std))
    expected = torch.stack([transform(picture(0)), transform(picture(1, (9, 200)))])
    batch = processor(text=[IMAGE, IMAGE], images=[picture(0), picture(1, (9, 200))])
    assert torch.equal(batch["pixel_values"], expected)
    assert processor.image_processor.transform == transform


@pytest.mark.parametrize("as_list", [True, False])
def test_one_picture_may_come_as_a_picture_or_a_list(processor, as_list):
    image = picture(0)
    batch = processor(text=f"{IMAGE} a", images=[image] if as_list else image)
    assert batch["pixel_values"].shape[0] == 1 and batch["input_ids"].shape == (1, 2)


def test_a_picture_may_be_a_path(processor, tmp_path):
    picture(0).save(tmp_path / "picture.png")
    for path in (tmp_path / "picture.png", str(tmp_path / "picture.png")):
        batch = processor(text=IMAGE, images=path)
        expected = processor(text=IMAGE, images=picture(0))
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_a_file_that_is_no_picture_is_refused(processor, tmp_path):
    whole = io.BytesIO()
    picture(0).save(whole, "PNG")
    for name, data in (("no.png", b"no picture"), ("half.png", whole.getvalue()[:400])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="damaged image"):
            processor(text=IMAGE, images=tmp_path / name)


@pytest.mark.parametrize(
    ("text", "pictures"),
    [
        (f"{IMAGE} a {IMAGE} b", 1),
        ("a", 1),
        (IMAGE, 0),
        ([f"{IMAGE} a", f"{IMAGE} b"], 3),
    ],
)
def test_another_number_of_pictures_than_image_tokens_is_refused(processor, text, pictures):
    wanted = "".join(text).count(IMAGE)
    with pytest.raises(ValueError, match=f"{wanted} {IMAGE} .* {pictures} pictures"):
        processor(text=text, images=[picture(i) for i in range(pictures)])


def test_text_alone_has_no_pixels(processor):
    assert "pixel_values" not in processor(text="a b", images=[])


def test_a_saved_processor_comes_back_the_same(processor, tmp_path):
    processor.image_processor.crop = "squash"
    processor.save_pretrained(tmp_path)
    back = FlamingoProcessor.from_pretrained(tmp_path)
    given = {"text": [f"{IMAGE} a {END_OF_CHUNK}", "b"], "images": [picture(0)]}
    before, after = processor(**given), back(**given)
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert back.image_processor.transform == processor.image_processor.transform
    assert back.image_token_id == processor.image_token_id
    assert back.end_of_chunk_token_id == processor.end_of_chunk_token_id


def test_the_image_processor_takes_size_and_normalisation_of_the_encoder():
    images = FlamingoImageProcessor(8, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    grey = PIL.Image.new("RGB", (8, 8), (51, 51, 51))  # 0.2
    pixels = images([grey])["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.2, 0.0, -0.05]))
