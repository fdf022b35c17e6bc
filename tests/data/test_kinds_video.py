"""A video becomes a clip: the frames that the options ask for, or a named fault."""

from __future__ import annotations

import io
import sys

import numpy as np
import PIL.Image
import pytest

from flamingo.data.document import Clip
from flamingo.data.errors import BadSample
from flamingo.data.kinds import longest_clip, reader
from flamingo.data.transforms import decoding_for

av = pytest.importorskip("av")


def movie(
    seconds: float = 10.0, rate: int = 4, codec: str = "mpeg4", form: str = "mp4", side: int = 64
) -> bytes:
    """A picture whose grey value is 20 x the second that it is shown in."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(int(seconds * rate)):
            grey = 20 * (number // rate)
            container.mux(
                stream.encode(av.VideoFrame.from_image(PIL.Image.new("RGB", (side, side), (grey,) * 3)))
            )
        container.mux(stream.encode())
    return file.getvalue()


MOVIE = movie()


def clip(data: bytes = MOVIE, ending: str = "mp4", key: str = "k", **options) -> Clip:
    item = reader("video", options)({ending: data, "txt": b"words"}, key).items[0]
    assert isinstance(item, Clip)
    return item


def seconds(shown: Clip) -> list[int]:
    return [round(frame.image.getpixel((5, 5))[0] / 20) for frame in shown.frames]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"frames": 3}, [0, 1, 2]),
        ({"frames": 3, "start": "middle"}, [3, 4, 5]),
        ({"frames": 3, "fps": 0.5}, [0, 2, 4]),
        ({"frames": 4, "fps": 2}, [0, 0, 1, 1]),
        ({"frames": 200}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"frames": 2, "fps": 0.11, "start": "start"}, [0]),  # the second would be at 9.09 + 9.09 > 10
        ({"frames": 1, "start": "middle"}, [4]),
    ],
)
def test_the_options_say_which_frames_are_seen(options, expected):
    assert seconds(clip(**options)) == expected


def test_a_random_start_follows_from_the_key_alone():
    starts = {key: seconds(clip(key=key, frames=2, start="random")) for key in "abcdefgh"}
    assert starts == {key: seconds(clip(key=key, frames=2, start="random")) for key in "abcdefgh"}
    assert len({tuple(start) for start in starts.values()}) > 2


def test_frames_that_lie_far_apart_are_sought(monkeypatch):
    long = movie(seconds=12, rate=2)
    assert seconds(clip(long, frames=2, fps=1 / 6)) == [0, 6]
    monkeypatch.setattr("flamingo.data.kinds.video.SEEK_SECONDS", 2.0)
    assert seconds(clip(long, frames=2, fps=1 / 6)) == [0, 6]


CONTAINERS = [
    ("webm", "webm", "libvpx"),
    ("mkv", "matroska", "mpeg4"),
    ("avi", "avi", "mpeg4"),
    ("mov", "mov", "libx264"),
]


@pytest.mark.parametrize(("ending", "form", "codec"), CONTAINERS)
def test_other_containers_and_codecs_are_read(ending, form, codec):
    assert seconds(clip(movie(4, codec=codec, form=form), ending, frames=3)) == [0, 1, 2]


def test_a_video_shorter_than_a_frames_time_gives_one_frame():
    assert seconds(clip(movie(0.5))) == [0]


def test_frames_have_keys_of_their_own_that_do_not_depend_on_the_other_frames():
    few, many = clip(frames=2), clip(frames=4)
    assert [f.key for f in few.frames] == [f.key for f in many.frames][:2]
    assert len({f.key for f in many.frames}) == 4
    assert all("." not in f.key for f in many.frames)


def test_frames_whose_features_are_stored_are_not_decoded():
    with decoding_for(32, lambda key: True):
        assert {f.image.size for f in clip().frames} == {(1, 1)}
    assert [f.key for f in clip().frames][0].endswith("-0")


@pytest.mark.parametrize(
    ("data", "options", "fault"),
    [
        (MOVIE, {"max_seconds": 9}, "too long video"),
        (MOVIE[: len(MOVIE) // 2], {}, "damaged video"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n", {}, "damaged video"),
        (b"ffconcat version 1.0\nfile /etc/hosts\n", {}, "damaged video"),
    ],
)
def test_what_is_wrong_with_a_video_has_a_name(data, options, fault):
    with pytest.raises(BadSample) as caught:
        clip(data, **options)
    assert caught.value.fault == fault


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr("flamingo.data.kinds.video.MAX_PIXELS", 64 * 64 // 2)
    with pytest.raises(BadSample, match="too large video"):
        clip(frames=3)
    assert len(clip(frames=2).frames) == 2


def test_two_videos_in_a_sample_and_none_are_faults():
    for sample, fault in (({}, "missing member"), ({"mp4": MOVIE, "avi": MOVIE}, "too many videos")):
        with pytest.raises(BadSample) as caught:
            reader("video", {})({**sample, "txt": b"words"}, "k")
        assert caught.value.fault == fault


def noise() -> bytes:
    """Six seconds of moving noise: every byte of the file says something about a picture."""
    file, base = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for number in range(24):
            picture = PIL.Image.fromarray(np.roll(base, 3 * number, 0))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return file.getvalue()


def test_a_damaged_stream_is_a_fault_and_not_frames_that_the_decoder_painted_over():
    """Left to itself the decoder reports two thirds of these."""
    good = noise()
    whole = [frame.image.tobytes() for frame in clip(good).frames]
    start, told, changed = good.index(b"mdat") + 64, 0, 0
    for at in range(start, len(good) - 1000, 997):
        damaged = good[:at] + bytes(byte ^ 0x55 for byte in good[at : at + 60]) + good[at + 60 :]
        try:
            changed += [frame.image.tobytes() for frame in clip(damaged).frames] != whole
        except BadSample:
            told += 1
    assert told > 20
    assert changed <= 1


def test_the_longest_clip_is_what_the_options_ask_for():
    assert longest_clip("video", {"frames": 5}) == 5
    assert longest_clip("pairs", {}) == 1


def test_without_pyav_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"flamingo-vlm\[video\]"):
        reader("video", {})
