"""Random changes of pictures and documents: functions of the position, bounded, and off by default."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from flamingo.data.augment import AUGMENTED, augment
from flamingo.data.batch import Collator
from flamingo.data.config import Augment, SourceConfig
from flamingo.data.document import Clip, Document, Image, Text
from flamingo.data.errors import TooManyBadSamples
from flamingo.data.stream import Stream
from flamingo.data.transforms import ImageTransform, decode_image, decoding_for


def picture(width: int = 40, height: int = 20) -> Image:
    """Every pixel says where it is."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image(PIL.Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8)), "key")


def documents(how: Augment, count: int = 200) -> list[PIL.Image.Image]:
    made = [augment(Document((picture(),), "k", seed), how) for seed in range(count)]
    return [document.items[0].image for document in made]  # type: ignore[union-attr]


def test_crops_keep_the_wanted_share_of_the_area_and_differ():
    sizes = [image.size for image in documents(Augment(crop_scale=(0.25, 0.5), crop_ratio=(1, 1)))]
    shares = [w * h / 800 for w, h in sizes]
    assert min(shares) > 0.2 and max(shares) < 0.55 and len(set(sizes)) > 5


def test_mirror_images_come_as_often_as_wanted():
    flipped = [image.getpixel((0, 0))[0] == 39 for image in documents(Augment(flip=0.25), 400)]  # type: ignore
    assert 0.18 < sum(flipped) / 400 < 0.32


def test_without_settings_the_pixels_stay():
    assert all(image.tobytes() == picture().image.tobytes() for image in documents(Augment(), 5))


def test_frames_of_a_clip_change_alike_and_pictures_of_a_document_differ():
    items = (Clip((picture(), picture())), picture(), Text("a"))
    clip, other, text = augment(Document(items, "k", 5), Augment(crop_scale=(0.2, 0.9))).items
    assert isinstance(clip, Clip) and isinstance(other, Image) and text == Text("a")
    first, second = clip.frames
    assert first.image.tobytes() == second.image.tobytes() != other.image.tobytes()
    assert AUGMENTED in first.key and first.key != other.key


@pytest.mark.parametrize("bad", [{"crop_scale": (0, 1)}, {"crop_scale": (0.5, 1.5)}, {"crop_ratio": (2, 1)}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValidationError, match="rising"):
        Augment(**bad)


def test_a_source_augments_by_position_alone(source):
    how = source.model_copy(update={"augment": Augment(crop_scale=(0.1, 1.0))})
    one, two = Stream(how, seed=1), Stream(how, seed=1)
    two[17]  # another order of reading

    def pixels(stream: Stream, position: int) -> tuple[tuple[int, int], str]:
        item = stream[position].items[0]
        assert isinstance(item, Image)
        return item.image.size, item.key

    assert [pixels(one, p) for p in range(48)] == [pixels(two, p) for p in range(48)]
    epochs = [sorted(pixels(one, p)[0] for p in range(e, e + 24)) for e in (0, 24)]
    assert epochs[0] != epochs[1]


def test_a_long_document_is_cut_anywhere_if_wanted(tokenizer, transform):
    turns = tuple(item for n in range(10) for item in (picture(), Text(str(n))))
    collate = Collator(tokenizer, transform, 1, 2, max_tokens=6, crop="random")
    rows = [collate([Document(turns, "k", seed)]).input_ids[0].tolist() for seed in range(100)]
    assert {len(row) for row in rows} == {6}
    firsts = {tokenizer.decode(row[1:2]) for row in rows}
    assert firsts == {str(n) for n in range(9)}  # the last start still fills the row
    short = collate([Document(turns[:2], "k", 3)])
    assert short.input_ids.shape == (1, 3)


def jpeg(side: int) -> bytes:
    file = io.BytesIO()
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    PIL.Image.fromarray(np.stack([np.tile(ramp, (side, 1))] * 3, -1)).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize(("side", "wanted", "decoded"), [(1024, 224, 512), (1024, 100, 256), (400, 224, 400)])
def test_a_large_jpeg_is_decoded_smaller_but_never_below_twice_what_is_wanted(side, wanted, decoded):
    data = jpeg(side)
    with decoding_for(wanted):
        small = decode_image(data)
    assert small.size == (decoded, decoded) and decode_image(data).size == (side, side)
    transform = ImageTransform(wanted, (0.5,) * 3, (0.5,) * 3)
    assert (transform(small) - transform(decode_image(data))).abs().max() < 0.05


def test_a_picture_that_is_cropped_at_random_is_decoded_in_full(write_tar, source):
    path = str(write_tar("j.tar", {"0": {"jpg": jpeg(64), "txt": b"x"}}))
    sizes = []
    for how in (None, Augment(flip=1.0)):
        changed = source.model_copy(update={"shards": path, "augment": how})
        item = Stream(changed, 1, image_side=8)[0].items[0]
        assert isinstance(item, Image)
        sizes.append(item.image.size)
    assert sizes == [(16, 16), (64, 64)]


def test_a_sample_that_is_too_large_is_bad_and_not_read(source):
    small = source.model_copy(update={"max_sample_mb": 1})
    stream = Stream(small, seed=1)
    stream._largest = 10  # bytes
    with pytest.raises(TooManyBadSamples, match="too large sample"):
        stream[0]


def test_options_of_a_kind_without_options_are_refused():
    source = SourceConfig(name="s", kind="pairs", shards="x", batch=1, max_tokens=4, options={"fps": 2})
    from flamingo.data.kinds import reader

    with pytest.raises(ValueError, match="pairs.*no options.*fps"):
        reader(source.kind, source.options)
