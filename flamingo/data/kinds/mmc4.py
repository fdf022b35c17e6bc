"""Multimodal C4 as published (Zhu et al. 2023, section 3): sentences and images of a web page.

    KEY.json      {"text_list": [...], "image_info": [{"image_name": "a.jpg", "matched_text_index": 1,
                   "matched_sim": 0.31}, ...], "similarity_matrix": [[...], ...]}
    KEY.a.jpg     members named by image_name, or "image_base64" in an entry of image_info

Which sentence an image stands beside is `assignment`:

    matched   as published: one image to a sentence, the best sum of similarities
    best      each image beside the sentence that it is most similar to (as OpenFlamingo trains)
    optimal   one to one, computed anew from the matrix, over the images that are large enough

Images that are too small, too dissimilar or too many are left out; that is no fault. One that is
listed but not there is: `flamingo data convert mmc4` drops what could not be downloaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flamingo.data.document import Document, Item, Text
from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members


class Options(BaseModel):
    """Which images are kept, and where they stand."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    assignment: Literal["matched", "best", "optimal"] = "matched"
    min_similarity: float = Field(
        default=0.24, description="CLIP similarity of image and sentence, at least."
    )
    min_side: int = Field(default=1, ge=1, description="Pixels of the shorter side, at least.")
    max_images: int = Field(
        default=6, ge=1, description="Images of a document; those that come first are kept."
    )
    image_place: Literal["before", "after"] = Field(default="before", description="Its sentence.")


class _Image(BaseModel):
    image_name: str | None = None
    image_base64: str | None = None
    matched_text_index: int | None = None
    matched_sim: float | None = None


class _Page(BaseModel):
    text_list: list[str]
    image_info: list[_Image]
    similarity_matrix: list[list[float]] | None = None


def read(sample: Mapping[str, bytes], key: str, options: Options = Options()) -> Document:  # noqa: B008
    """The document in reading order; see the package docstring for the contract."""
    page = _page(_members.json_object(_members.member(sample, "json")))
    pictures = [_bytes(sample, image) for image in page.image_info]
    large = [n for n, data in enumerate(pictures) if min(_members.size(data)) >= options.min_side]
    places = [(sentence, image) for image, sentence in _assign(page, large, options).items()]
    places = sorted(places)[: options.max_images]
    if not places:
        raise BadSample("no image", f"none of {len(pictures)} images is large and similar enough")
    items: list[Item] = []
    after = options.image_place == "after"
    start = 0
    for sentence, image in places:
        border = sentence + after
        items += _text(page.text_list[start:border])
        items.append(_members.image(pictures[image]))
        start = max(start, border)
    items += _text(page.text_list[start:])
    if not any(isinstance(item, Text) for item in items):
        raise BadSample("no text", "all sentences are empty")
    return Document(tuple(items), key)


def _page(fields: dict) -> _Page:
    try:
        page = _Page.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadSample("bad json", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    shape = (len(page.image_info), len(page.text_list))
    matrix = page.similarity_matrix
    if matrix is not None and (len(matrix) != shape[0] or any(len(row) != shape[1] for row in matrix)):
        what = f"similarity_matrix must be {shape[0]} images x {shape[1]} sentences"
        raise BadSample("bad json", what)
    return page


def _bytes(sample: Mapping[str, bytes], image: _Image) -> bytes:
    if image.image_base64 is not None:
        return _members.from_base64(image.image_base64)
    return _members.member(sample, _members.text(image.image_name, "'image_name'"))


def _assign(page: _Page, large: list[int], options: Options) -> dict[int, int]:
    """image -> sentence, of those that are similar enough."""
    if options.assignment == "matched":
        found = {n: _matched(page, n) for n in large}
    elif page.similarity_matrix is None:
        raise BadSample("bad json", f"assignment={options.assignment!r} needs similarity_matrix")
    elif options.assignment == "best":
        found = {n: _best(page.similarity_matrix[n]) for n in large}
    else:
        found = _optimal(page.similarity_matrix, large)
    return {
        n: sentence for n, (sentence, similarity) in found.items() if similarity >= options.min_similarity
    }


def _matched(page: _Page, number: int) -> tuple[int, float]:
    image = page.image_info[number]
    sentence, similarity = image.matched_text_index, image.matched_sim
    if sentence is None or similarity is None or not 0 <= sentence < len(page.text_list):
        what = f"image {number}: matched_text_index {sentence}, matched_sim {similarity}"
        raise BadSample("bad json", f"{what}; must be one of {len(page.text_list)} sentences and a number")
    return sentence, similarity


def _best(row: list[float]) -> tuple[int, float]:
    if not row:
        raise BadSample("no text", "text_list is empty")
    sentence = max(range(len(row)), key=row.__getitem__)
    return sentence, row[sentence]


def _optimal(matrix: list[list[float]], large: list[int]) -> dict[int, tuple[int, float]]:
    from scipy.optimize import linear_sum_assignment

    rows = [matrix[n] for n in large]
    if not all(math.isfinite(value) for row in rows for value in row):
        raise BadSample("bad json", "similarity_matrix holds what is not a number")
    if not rows or not rows[0]:
        return {}
    images, sentences = linear_sum_assignment(rows, maximize=True)
    pairs = zip(images.tolist(), sentences.tolist(), strict=True)
    return {large[image]: (sentence, rows[image][sentence]) for image, sentence in pairs}


def requires(options: Options) -> None:
    """Raises ValueError where a package that these options need is not there."""
    if options.assignment == "optimal":
        try:
            import scipy  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("assignment 'optimal' needs SciPy: pip install 'flamingo-vlm[mmc4]'") from None


def _text(sentences: list[str]) -> list[Item]:
    words = " ".join(stripped for sentence in sentences if (stripped := sentence.strip()))
    return [Text(_members.text(words, "text_list"))] if words else []


def example() -> dict[str, bytes]:
    page = {
        "text_list": ["A page.", "A blue square.", "The end."],
        "image_info": [{"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.31}],
        "similarity_matrix": [[0.1, 0.31, 0.05]],
    }
    return {"json": json.dumps(page).encode(), "a.png": _members.example_png()}
