"""`flamingo chat` and `flamingo generate`: options, and what is said at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo.data.tools.commands import plain_errors, stop

if TYPE_CHECKING:
    from flamingo.serving.job import Outcome
    from flamingo.serving.prompt import Sampling

SHOWN = 3  # errors of a file that are printed; the file has all

Styled = Annotated[
    str | None,
    typer.Option(
        "--style",
        help="How turns become a prompt: few-shot (default; Question: ... Answer: ...), template (the "
        "processor's chat template) or plain.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Of sampling, e.g. temperature=0.7; several times."),
]
Longest = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


def chat(
    model: Annotated[Path, typer.Argument(help="Model folder, e.g. runs/quickstart/model.")],
    image: Annotated[list[Path] | None, typer.Option(help="Picture of the first question.")] = None,
    style: Styled = None,
    max_new_tokens: Longest = 32,
    settings: Settings = None,
) -> None:
    """Talk with a model about pictures. In a pipe: lines in, one line per answer out.

    /image PATH adds a picture to the next question, /help shows the other
    commands. Ctrl-C ends an answer, Ctrl-D the chat.
    """
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    from flamingo.serving.styles import check_style

    with plain_errors():
        known, sampling = check_style(style or "few-shot"), _sampling(max_new_tokens, settings)
        from flamingo.serving.chat import Chat
        from flamingo.serving.engine import Engine
        from flamingo.serving.terminal import talk

        raise typer.Exit(talk(Chat(Engine(model), known, sampling), image or []))


def generate(
    model: Annotated[Path, typer.Option(help="Model folder, e.g. runs/quickstart/model.")],
    prompt: Annotated[str | None, typer.Option(help="Text; <image> stands where a picture stands.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture; give one per <image>.")] = None,
    input: Annotated[Path | None, typer.Option(help="Or many prompts: JSONL, one a line.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of the answers; to go on, the same.")] = None,
    style: Styled = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts at a time. Default: 8.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Default: one per GPU; on a CPU, one.", show_default=False)
    ] = None,
    max_new_tokens: Longest = 32,
    settings: Settings = None,
) -> None:
    """Answer a prompt about pictures, or a file of prompts.

    Without <image> in a prompt, pictures come first. A line of a file is
    {"prompt": ..., "images": [...]} or {"messages": [...]}. Stopped, the same
    command goes on; under torchrun, deepspeed or srun the processes share the
    prompts: torchrun -m flamingo.serving --model MODEL --input ... --output ...
    """
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    of_files = {"output": output, "style": style, "batch-size": batch_size, "processes": processes}
    with plain_errors():
        sampling = _sampling(max_new_tokens, settings)
        if (prompt is None) == (input is None):
            raise ValueError("give --prompt or --input, one of them")
        if prompt is not None:
            if extra := [name for name, value in of_files.items() if value is not None]:
                raise ValueError(f"--{extra[0]} goes with --input, not with --prompt")
            typer.echo(_answer(model, prompt, image or [], sampling))
            return
        if image:
            raise ValueError('--image goes with --prompt; a line of --input names its own, "images": [...]')
        assert input is not None
        if output is None:
            raise ValueError("--output is missing: the file for the answers")
        from flamingo.serving.job import Job, run_job
        from flamingo.serving.styles import check_style

        job = Job(model, input, output, check_style(style or "few-shot"), batch_size or 8, sampling)
        try:
            outcome = run_job(job, processes)
        except KeyboardInterrupt:
            stop("stopped; the same command goes on")
        if outcome is not None:
            _show(output, outcome)


def _sampling(max_new_tokens: int, settings: list[str] | None) -> Sampling:
    from flamingo.serving.prompt import Sampling
    from flamingo.serving.settings import changed, parsed

    return changed(Sampling(max_new_tokens=max_new_tokens), parsed(" ".join(settings or [])))


def _answer(folder: Path, text: str, images: list[Path], sampling: Sampling) -> str:
    from flamingo.folders import check_model
    from flamingo.processing import IMAGE
    from flamingo.serving.engine import Engine
    from flamingo.serving.prompt import Prompt, open_picture

    check_model(folder)
    pictures = tuple(map(open_picture, images))
    prompt = Prompt(text if IMAGE in text else IMAGE * len(pictures) + text, pictures)
    return Engine(folder).answer(prompt, sampling).text


def _show(output: Path, outcome: Outcome) -> None:
    """How many, how fast; exit status 1 where some have errors."""
    rate = f", {outcome.asked} of them now, {outcome.asked / outcome.seconds:.1f}/s" if outcome.asked else ""
    answers = len(outcome.records) - len(outcome.errors)
    typer.echo(f"{output}: {answers} answers{rate if outcome.asked else ', none was missing'}")
    for record in outcome.errors[:SHOWN]:
        typer.echo(f"{record['id']}: {record['error']}", err=True)
    if outcome.errors:
        stop(f"{len(outcome.errors)} prompts have an error; the same command asks only these again")
