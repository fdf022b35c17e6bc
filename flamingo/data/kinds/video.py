"""A video and its caption: KEY.mp4 (mov, webm, mkv, avi) with KEY.txt or KEY.json.

N frames at F frames per second become one `Clip`, which is one <image> token (Alayrac et al. 2022,
appendix A.3.2: 8 frames at 1 per second). Decoded with PyAV.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

import PIL.Image
from pydantic import BaseModel, ConfigDict, Field

from flamingo.data.document import Clip, Document, Image, Text, content_key
from flamingo.data.draws import uniform
from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members
from flamingo.data.transforms import MAX_PIXELS, needs_pixels

# The reader of each ending is named, because FFmpeg's own guess knows formats that open other
# files and addresses (playlists).
FORMATS = {"mp4": "mp4", "mov": "mp4", "webm": "matroska", "mkv": "matroska", "avi": "avi"}
SEEK_SECONDS = 10.0  # a gap between frames beyond which seeking beats decoding on


class Options(BaseModel):
    """Which frames of a video are seen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    frames: int = Field(
        default=8, ge=1, le=256, description="Frames of a clip; fewer where a video is shorter."
    )
    fps: float = Field(default=1.0, gt=0, le=120, description="Frames per second.")
    start: Literal["start", "middle", "random"] = Field(
        default="start", description="Where the clip lies in a longer video; random: by the sample's key."
    )
    max_seconds: float = Field(default=7200.0, gt=0, description="A longer video is a bad sample.")


def read(sample: Mapping[str, bytes], key: str, options: Options = Options()) -> Document:  # noqa: B008
    """The document (clip, caption); see the package docstring for the contract."""
    name = _members.one_of(sample, tuple(FORMATS), "video")
    caption, data = _members.caption(sample), sample[name]
    try:
        frames = tuple(_frames(data, FORMATS[name], key, options))
    except BadSample:
        raise
    except Exception as error:  # FFmpeg's own errors, and what PyAV makes of damaged headers
        raise BadSample("damaged video", f"{len(data)} bytes: {error!r}") from error
    return Document((Clip(frames), Text(caption)), key)


def _frames(data: bytes, form: str, key: str, options: Options) -> Iterator[Image]:
    import av

    digest = content_key(data)
    with av.open(io.BytesIO(data), format=form, metadata_errors="ignore") as container:
        if not container.streams.video:
            raise BadSample("damaged video", "it holds no video stream")
        stream = container.streams.video[0]
        seconds = _check(container, stream, options)
        times = _times(seconds, key, options)
        keys = [f"{digest}-{round(1000 * time)}" for time in times]
        if not any(map(needs_pixels, keys)):
            blank = PIL.Image.new("RGB", (1, 1))
            yield from (Image(blank, name) for name in keys)
            return
        # Without this, a decoder paints over what is damaged and says nothing.
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode", "threads": "1"}
        for name, frame in zip(keys, _decoded(container, stream, times), strict=True):
            yield Image(_upright(frame), name)


def _check(container: Any, stream: Any, options: Options) -> float:
    """The video's length in seconds, once its header keeps the limits."""
    pixels = stream.codec_context.width * stream.codec_context.height
    if not 0 < pixels * options.frames <= 4 * MAX_PIXELS:
        what = f"{options.frames} frames of {pixels} pixels, at most {4 * MAX_PIXELS} pixels are decoded"
        raise BadSample("too large video", what)
    length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
    if not 0 < length <= options.max_seconds:
        what = f"its header says {float(length):g} seconds, max_seconds allows {options.max_seconds:g}"
        raise BadSample("too long video" if length > 0 else "damaged video", what)
    return float(length)


def _times(seconds: float, key: str, options: Options) -> list[float]:
    """Seconds from the start of the video at which frames are taken, at least one."""
    count = max(1, min(options.frames, int(seconds * options.fps + 1e-6)))
    spare = max(0.0, seconds - count / options.fps)
    first = {"start": 0.0, "middle": spare / 2, "random": uniform(0.0, spare, key, "clip")}[options.start]
    return [first + number / options.fps for number in range(count)]


def _decoded(container: Any, stream: Any, times: list[float]) -> Iterator[Any]:
    """At each time the frame that is on the screen then."""
    begin = float((stream.start_time or 0) * stream.time_base)
    frames: Iterator[Any] = iter(())
    shown = following = None
    for number, time in enumerate(times):
        if not number or time - times[number - 1] > SEEK_SECONDS:
            container.seek(int((begin + time) / stream.time_base), stream=stream)
            frames, shown = container.decode(stream), None
            following = next(frames, None)
        while following is not None and (shown is None or following.time - begin <= time + 1e-6):
            shown, following = following, next(frames, None)
        if (
            shown is None
            or shown.is_corrupt
            or (following is None and _ends_early(shown, stream, begin + time))
        ):
            raise BadSample("damaged video", f"no sound frame at {time:.3f} seconds")
        yield shown


def _ends_early(last: Any, stream: Any, time: float) -> bool:
    """Whether the last frame is long over at a time that the header says there is."""
    rate = float(stream.average_rate or stream.guessed_rate or 1)
    return time - last.time > max(2 / rate, 0.5)


def _upright(frame: Any) -> PIL.Image.Image:
    picture = frame.to_image()  # RGB
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def requires(options: Options) -> None:
    """Raises ValueError where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("videos need PyAV: pip install 'flamingo-vlm[video]'") from None


@lru_cache(maxsize=1)
def _example_mp4() -> bytes:
    """Two seconds, from black to grey."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 32  # type: ignore[union-attr]
        stream.pix_fmt = "yuv420p"  # type: ignore[union-attr]
        for number in range(4):
            frame = av.VideoFrame.from_image(PIL.Image.new("RGB", (32, 32), (40 * number,) * 3))
            container.mux(stream.encode(frame))  # type: ignore[union-attr]
        container.mux(stream.encode())  # type: ignore[union-attr]
    return file.getvalue()


def example() -> dict[str, bytes]:
    return {"mp4": _example_mp4(), "txt": b"It becomes brighter"}
