"""The page itself. The only file that imports Gradio.

Its texts are in components, which the browser keeps; its pictures are in this session's memory on the
server, one `gr.State` for each row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

import gradio as gr
from gradio.themes import Default
from gradio.utils import get_upload_folder
from PIL.Image import Image
from starlette.middleware import Middleware

from flamingo.data.transforms import FORMATS
from flamingo.serving.demo import markup
from flamingo.serving.demo.asking import Asking, Told
from flamingo.serving.demo.examples import Example, card, examples
from flamingo.serving.demo.limits import Limits, check_files
from flamingo.serving.demo.overlay import reduced
from flamingo.serving.demo.server import Guard, Place
from flamingo.serving.demo.turns import Turn, arranged
from flamingo.serving.prompt import Sampling

PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # nobody but the page calls its functions
ENDINGS = [f".{name.lower()}" for name in (*FORMATS, "JPG", "TIF")]
SETTINGS = tuple(field.name for field in fields(Sampling))
ASK_FOR = "Question: what color is the shape? Answer:"
INTRODUCTION = """# Ask about pictures
**1.** Pick one of the prompts below, or choose a picture and write a question. **2.** Press *Ask*.
**3.** Click a word of the answer to see where on the pictures the model looked when it chose it."""


@dataclass(frozen=True)
class Held:
    """A picture of the prompt: where it was uploaded to, or itself where it came with the page."""

    small: Image
    source: Path | Image


@dataclass(frozen=True)
class Row:
    """One turn on the page: an example, or the question, which has no answer."""

    block: Any
    held: gr.State
    preview: gr.HTML
    upload: gr.UploadButton
    take_out: gr.Button
    text: gr.Textbox
    answer: gr.Textbox | None


class Page(gr.Blocks):
    """Refuses every request that names a file which was not uploaded, before Gradio fetches it."""

    is_template = True  # the browser knows it as Blocks

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        try:
            check_files(inputs, Path(get_upload_folder()))
        except ValueError as error:
            raise gr.Error(str(error)) from None
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def build(asking: Asking, name: str, queue: int) -> gr.Blocks:
    """The page of a model. queue: events that may wait at once."""
    limits = asking.limits
    # Old uploads go away by themselves: looked for every ten minutes, kept for six hours.
    with Page(title=f"Flamingo: {name}", analytics_enabled=False, delete_cache=(600, 6 * 3600)) as page:
        gr.Markdown(INTRODUCTION)
        gallery = _gallery(limits)
        shown, told = gr.State(0), gr.State(Told(), time_to_live=6 * 3600)
        with gr.Row():
            with gr.Column(scale=3):
                rows = [_row(number, limits) for number in range(limits.max_pictures - 1)]
                with gr.Row():
                    add = gr.Button("Add an example before the question", size="sm", elem_id="add")
                    fresh = gr.Button("Clear the prompt", size="sm", elem_id="fresh")
                question = _row(None, limits)
            with gr.Column(scale=2):
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                answer = gr.Textbox(
                    label="Answer",
                    lines=2,
                    interactive=False,
                    elem_id="answer",
                    placeholder="(not asked yet)",
                )
                status = gr.HTML(elem_id="status")
                words = gr.Radio(
                    [], label="Click a word: where did the model look?", visible=False, elem_id="words"
                )
                look = gr.HTML(elem_id="looks")
                settings = _settings(limits)
        if gates := asking.engine.gates():
            with gr.Accordion("How far the gates are open", open=False, elem_id="gates"):
                gr.HTML(markup.gates_html(gates))
        _arranging(rows, question, shown, add, fresh, gallery)
        for row in [*rows, question]:
            _picture_events(row, limits)

        inputs = [shown, *(part for row in [*rows, question] for part in _parts(row)), *settings]
        outputs = [answer, status, words, look, told]
        for asked in (ask.click, question.text.submit):
            asked(_begin(asking), None, outputs, queue=False, show_progress="hidden", **PRIVATE).then(
                _asked(asking, len(rows)), inputs, outputs, concurrency_id="model", concurrency_limit=1,
                show_progress="full", show_progress_on=answer, **PRIVATE,
            )  # fmt: skip
        stop.click(_stop(asking), None, None, queue=False, **PRIVATE)
        page.unload(_stop(asking))
        words.input(
            _look(asking), [words, told], look, queue=False, show_progress="hidden", trigger_mode="multiple",
            **PRIVATE,
        )  # fmt: skip
    page.queue(max_size=queue, default_concurrency_limit=2, api_open=False)
    return page


def launch(page: gr.Blocks, place: Place, limits: Limits, wait: bool = True) -> str:
    """Serve the page until it is interrupted, or with wait=False until `page.close()`; its address."""
    theme = Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="orange"
    )
    _, url, _ = page.launch(
        server_name=place.host, server_port=place.port, root_path=place.root_path or None, theme=theme,
        css=markup.STYLE, share=False, quiet=True, inbrowser=False, show_error=True, prevent_thread_lock=True,
        max_file_size=limits.max_megabytes * 1_000_000, allowed_paths=[], footer_links=[], ssr_mode=False,
        enable_monitoring=False, mcp_server=False, pwa=False, state_session_capacity=1000,
        app_kwargs={"middleware": [Middleware(Guard)]},
    )  # fmt: skip
    if wait:
        page.block_thread()
    return url


# -- what stands on the page --------------------------------------------------------------


def _gallery(limits: Limits) -> list[tuple[Example, gr.Button]]:
    """Each example's pictures with a button below that puts it into the prompt."""
    made = []
    with gr.Row(elem_id="gallery"):
        for example in examples(limits.max_pictures):
            with gr.Column(min_width=180), gr.Group():
                gr.HTML(markup.card_html(card(example)), padding=True)
                made.append((example, gr.Button(example.name, size="md")))
    return made


def _row(number: int | None, limits: Limits) -> Row:
    """number: of an example; None: the question."""
    name = "question" if number is None else f"example-{number}"
    with gr.Group(visible=number is None, elem_id=name) as block, gr.Row():
        with gr.Column(scale=1, min_width=150):
            preview = gr.HTML(markup.picture_html(None), elem_id=f"{name}-picture", padding=True)
            with gr.Row():
                upload = gr.UploadButton(
                    "Upload", size="sm", file_types=ENDINGS,
                    elem_id=f"{name}-upload", min_width=60,
                )  # fmt: skip
                take_out = gr.Button("Remove", size="sm", min_width=60, elem_id=f"{name}-take-out")
        with gr.Column(scale=3):
            text = gr.Textbox(
                label="Question" if number is None else f"Example {number + 1}: its text", lines=1,
                placeholder=ASK_FOR, max_length=limits.max_characters, elem_id=f"{name}-text",
                info="As the model's training wrote it; the quickstart's: Question: ... Answer:"
                if number is None else None,
            )  # fmt: skip
            answer = None
            if number is not None:
                answer = gr.Textbox(
                    label="its answer", lines=1, placeholder="red", max_length=limits.max_characters,
                    elem_id=f"{name}-answer",
                )  # fmt: skip
    return Row(block, gr.State(None, time_to_live=6 * 3600), preview, upload, take_out, text, answer)


def _settings(limits: Limits) -> list[Any]:
    """One component for each field of `Sampling`, in its order."""
    default = Sampling()
    with gr.Accordion("How the answer is drawn", open=False, elem_id="settings"):
        made = {
            "max_new_tokens": gr.Slider(
                1, limits.max_new_tokens, min(default.max_new_tokens, limits.max_new_tokens), step=1,
                info="the longest answer",
            ),
            "temperature": gr.Slider(0, 2, default.temperature, step=0.05, info="0: the likeliest each time"),
            "top_p": gr.Slider(0.05, 1, default.top_p, step=0.05, info="1: all tokens; needs a temperature"),
            "top_k": gr.Slider(0, 200, default.top_k, step=1, info="0: all tokens; needs a temperature"),
            "repetition_penalty": gr.Slider(0.5, 2, default.repetition_penalty, step=0.05, info="1: none"),
            "num_beams": gr.Slider(1, limits.max_beams, default.num_beams, step=1, info="1: no beam search"),
            "seed": gr.Number(default.seed, precision=0, info="empty: another each time"),
        }  # fmt: skip
        for name, component in made.items():
            component.label, component.elem_id = name, f"set-{name}"
    return [made[name] for name in SETTINGS]


def _parts(row: Row) -> list[Any]:
    return [row.held, row.text] if row.answer is None else [row.held, row.text, row.answer]


# -- what happens on it --------------------------------------------------------------------


def _picture_events(row: Row, limits: Limits) -> None:
    def put(file: str | None, held: Held | None) -> tuple[Held | None, str]:
        if file is None:
            return held, markup.picture_html(held and held.small)
        try:
            picture = limits.read_picture(Path(file), Path(get_upload_folder()))
        except ValueError as error:
            return None, markup.picture_html(None, str(error))
        small = reduced(picture)
        return Held(small, Path(file)), markup.picture_html(small)

    shown = [row.held, row.preview]
    row.upload.upload(
        put, [row.upload, row.held], shown, concurrency_id="pictures", show_progress_on=row.preview, **PRIVATE
    )
    row.take_out.click(lambda: (None, markup.picture_html(None)), None, shown, queue=False, **PRIVATE)


def _arranging(
    rows: list[Row],
    question: Row,
    shown: gr.State,
    add: Any,
    fresh: Any,
    gallery: list[tuple[Example, gr.Button]],
) -> None:
    """Events that change which examples there are, and in which order."""
    blank: tuple[Any, str, str] = (None, "", "")
    state = [shown, *(part for row in rows for part in _parts(row))]
    placed = [shown, *(p for row in rows for p in (row.block, row.held, row.preview, row.text, row.answer))]

    def place(turns: Sequence[tuple[Any, str, str]], count: int) -> list[Any]:
        updates: list[Any] = [count]
        for number, (held, text, answer) in enumerate(turns):
            preview = markup.picture_html(held and held.small)
            updates += [gr.update(visible=number < count), held, preview, text, answer]
        return updates

    def arrange(action: str, index: int, count: int, *values: Any) -> list[Any]:
        turns = [tuple(values[start : start + 3]) for start in range(0, len(values), 3)]
        return place(*arranged(turns, count, action, index, blank))

    def fill(turns: Sequence[Turn]) -> list[Any]:
        *before, last = [
            (t.picture and Held(reduced(t.picture), t.picture), t.text, t.answer) for t in turns or (Turn(),)
        ]
        asked = [last[0], markup.picture_html(last[0] and last[0].small), last[1]]
        return [*place([*before, *[blank] * (len(rows) - len(before))], len(before)), *asked]

    everything = [*placed, question.held, question.preview, question.text]
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
    add.click(partial(arrange, "add", 0), state, placed, **quiet)
    fresh.click(lambda: fill(()), None, everything, **quiet)
    for example, button in gallery:
        button.click(partial(fill, example.turns), None, everything, **quiet)
    for number, row in enumerate(rows):
        with row.block, gr.Row():
            for action, label in (("up", "Up"), ("down", "Down"), ("remove", "Remove this example")):
                button = gr.Button(label, size="sm", min_width=60, elem_id=f"example-{number}-{action}")
                button.click(partial(arrange, action, number), state, placed, **quiet)


def _begin(asking: Asking) -> Any:
    def begin(request: gr.Request) -> list[Any]:
        asking.begin(request.session_hash or "")
        return ["", "", gr.update(choices=[], value=None, visible=False), "", Told()]

    return begin


def _stop(asking: Asking) -> Any:
    def stop(request: gr.Request) -> None:
        asking.stop(request.session_hash or "")

    return stop


def _asked(asking: Asking, examples_most: int) -> Any:
    def asked(request: gr.Request, count: int, *values: Any) -> Iterator[list[Any]]:
        split = 3 * examples_most + 2
        given = [values[start : start + 3] for start in range(0, 3 * examples_most, 3)][:count]
        given.append((*values[3 * examples_most : split], ""))
        try:
            turns = [
                Turn(text or "", _picture(held, asking.limits), answer or "") for held, text, answer in given
            ]
        except ValueError as error:
            yield ["", markup.status_html(str(error), True), gr.skip(), gr.skip(), gr.skip()]
            return
        settings = dict(zip(SETTINGS, values[split:], strict=True))
        for update in asking.ask(turns, settings, request.session_hash or ""):
            shown: list[Any] = [update.text, markup.status_html(update.status, update.error)]
            if update.told is None:
                yield [*shown, gr.skip(), gr.skip(), gr.skip()]
                continue
            choices = [(word.word, number) for number, word in enumerate(update.told.words)]
            yield [*shown, gr.update(choices=choices, value=None, visible=bool(choices)), "", update.told]

    return asked


def _picture(held: Held | None, limits: Limits) -> Image | None:
    if held is None or not isinstance(held.source, Path):
        return held and held.source  # type: ignore[return-value]
    return limits.read_picture(held.source, Path(get_upload_folder()))


def _look(asking: Asking) -> Any:
    def look(number: int | None, told: Told) -> str:
        try:
            return asking.look(told, -1 if number is None else number)
        except ValueError as error:
            return markup.status_html(str(error), True)

    return look
