"""`flamingo clip ...`: options, and what is said at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from flamingo.data.tools.commands import Kind, KindOptions, options_of, plain_errors

app = typer.Typer(
    help="CLIP models: index and search pictures, classify without training, score captions.",
    no_args_is_help=True,
)

SHOWN = 20  # bad pictures that are named
CAPTION = 60  # letters of one that is printed

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Folders of pictures, with all folders inside; pictures; or shards: tars, globs or ranges, e.g. "
        "'shards-{000..009}.tar'."
    ),
]
Encoder = Annotated[
    str,
    typer.Option(
        help="open_clip:ARCHITECTURE/WEIGHTS; open_clip:FOLDER, one with open_clip_config.json; or "
        "model:FOLDER, a Flamingo's own, for pictures alone."
    ),
]
MaxBad = Annotated[
    float, typer.Option(min=0, max=1, help="Share of pictures that may be unreadable; they are left out.")
]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON each.")]
DEFAULT = "open_clip:ViT-B-32/openai"


@app.command()
def embed(
    sources: Sources,
    out: Annotated[
        str, typer.Option(help="Folder, or Milvus: FILE.db, http://HOST:19530; #NAME names the collection.")
    ],
    encoder: Encoder = DEFAULT,
    texts: Annotated[
        bool, typer.Option("--texts", help="SOURCES are text files: each line is embedded.")
    ] = False,
    kind: Kind = "pairs",
    options: KindOptions = "{}",
    rebuild: Annotated[bool, typer.Option(help="Replace an index of other things or encoder.")] = False,
    max_bad: MaxBad = 0.5,
    npz: Annotated[
        Path | None, typer.Option(help="Also a file for numpy: ids, where, captions, vectors.")
    ] = None,
) -> None:
    """Index pictures, or lines of text, for `flamingo clip search`.

    Vectors are kept by content: interrupted, it goes on; with more pictures,
    only those are computed. Of each picture its place and its caption are kept,
    where a .txt lies beside it or a shard has one. Pictures that cannot be
    read are named and left out. FLAMINGO_MILVUS_TOKEN is the token of a Milvus.
    """
    _begin()
    with plain_errors():
        from flamingo.eval.clip.index import embed as run

        made = run(
            sources, out, encoder, as_texts=texts, kind=kind, options=options_of(options), rebuild=rebuild,
            max_bad=max_bad, npz=npz,
        )  # fmt: skip
        _tell(made.bad)
        told = made.catalogue
        what = "texts" if texts else "pictures"
        typer.echo(f"{told.items:,} {what}, {told.rows:,} vectors of {told.width}: {made.address}")
        typer.echo(f"flamingo clip search {shlex.quote(made.address)} 'a red circle'")


@app.command()
def search(
    where: Annotated[str, typer.Argument(help="What `flamingo clip embed` made: a folder, or a Milvus.")],
    text: Annotated[str | None, typer.Argument(help="What is sought, in words.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture that is like it; with a text, the sum of both.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    encoder: Annotated[
        str | None, typer.Option(help="The index's own, where it lies now. Default: where it lay.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what is nearest to a text or a picture: score (cosine), id, caption; the nearest first.

    The search is exact, and the same in a folder (FAISS) and in a Milvus.
    """
    _begin()
    with plain_errors():
        from flamingo.eval.clip.index import as_json as line
        from flamingo.eval.clip.index import search as run

        for hit in run(where, text, image, top, encoder):
            caption = f"  {_short(hit.caption, CAPTION)}" if hit.caption else ""
            typer.echo(line(hit) if as_json else f"{hit.rank:3}  {hit.score:.4f}  {hit.id}{caption}")


@app.command()
def classify(
    pictures: Sources,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Names with commas between; or a file, one on each line (LABEL, tab, NAME where folders "
            "call it otherwise). Default with --labels: the labels."
        ),
    ] = None,
    encoder: Encoder = DEFAULT,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Prompt with {} for the class; give it several times. Default: four about photos."),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Score: folders are CLASS/PICTURE, shards have cls or txt.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes shown of each picture.")] = 5,
    kind: Kind = "pairs",
    options: KindOptions = "{}",
    max_bad: MaxBad = 0.5,
    as_json: Json = False,
) -> None:
    """Say which of some classes is on each picture, without training.

    Probabilities are a softmax over the classes; of a SigLIP each class has
    its own (sigmoid), and their sum need not be 1. With --labels, top-1 and
    top-5 accuracy with a 95 % interval. Vectors of pictures are kept in
    FLAMINGO_CACHE: other classes are asked without looking again.
    """
    _begin()
    with plain_errors():
        import json

        from flamingo.eval.clip.classify import TEMPLATES, accuracies, prepare

        work = prepare(
            pictures, encoder, classes, template or TEMPLATES, labelled=labels, kind=kind,
            options=options_of(options), max_bad=max_bad,
        )  # fmt: skip
        _tell(work.bad)
        activation = work.classifier.activation
        if activation == "sigmoid" and not as_json:
            typer.echo("sigmoid: each class has a probability of its own, their sum need not be 1")
        places = []
        for answer in work.answers(top):
            scores = "  ".join(f"{name} {share:.3f}" for name, share in answer.scores)
            typer.echo(answer.as_json(activation) if as_json else f"{answer.id}  {scores}")
            places.append(answer.place)
        if not labels:
            return
        shares = accuracies(places, len(work.classifier.classes))
        if as_json:
            told = {f"top{k}": {"value": v, "interval": list(i)} for k, (v, i) in shares.items()}
            typer.echo(json.dumps({"pictures": len(places), **told, "activation": activation}))
            return
        for k, (share, (low, high)) in shares.items():
            span = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
            typer.echo(f"top-{k} {100 * share:.1f} %  ({span}, {len(places):,} pictures)")


@app.command()
def score(
    answers: Annotated[
        Path,
        typer.Argument(
            help="Folder of `flamingo eval run` on captions; or lines of JSON with image and caption, and "
            "references where there are some."
        ),
    ],
    encoder: Annotated[
        str | None,
        typer.Option(
            help="open_clip:ARCHITECTURE/WEIGHTS or open_clip:FOLDER. Default: FLAMINGO_CLIP_SCORE, or the "
            f"paper's, {DEFAULT}.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures, where they no longer lie where they did.")
    ] = None,
    each: Annotated[
        Path | None, typer.Option(help="File for the scores of each caption, JSON lines.")
    ] = None,
    as_json: Json = False,
) -> None:
    """CLIPScore of captions that a model said already, and with references RefCLIPScore.

    The model is not asked again. Every setting of an evaluation has a line:
    value times 100, 95 % interval over pictures. Scores of two encoders
    cannot be compared.
    """
    _begin()
    with plain_errors():
        import json

        from flamingo.data.writing import write_text
        from flamingo.eval.clip.scores import score as run
        from flamingo.eval.metrics._clip import encoder as loaded

        lines = []
        for scored in run(answers, encoder, images):
            lines += [json.dumps(record, ensure_ascii=False) for record in scored.each]
            if as_json:
                typer.echo(scored.as_json(loaded(encoder).name))
                continue
            for figure in scored.figures.values():
                low, high = (figure.scale * bound for bound in figure.interval)
                span = f"({low:.1f} to {high:.1f}, {scored.n:,} captions)"
                name = f"{scored.name} {figure.title}".strip()
                typer.echo(f"{name:56} {figure.scale * figure.value:7.2f}  {span}")
            if scored.empty:
                typer.echo(f"{scored.empty:,} of these captions are empty, and scored as they are", err=True)
        if each is not None:
            text = "".join(f"{line}\n" for line in lines)
            write_text(each, text)


def _begin() -> None:
    from flamingo.runtime import quiet_libraries, tune_cpu

    quiet_libraries()
    tune_cpu()


def _tell(bad: Mapping[str, str]) -> None:
    for where, why in list(bad.items())[:SHOWN]:
        typer.echo(f"left out: {where}: {why}", err=True)
    if bad:
        more = f", the first {SHOWN} are named" if len(bad) > SHOWN else ""
        typer.echo(f"{len(bad):,} cannot be read and are left out{more}", err=True)


def _short(text: str, letters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 1] + "…"
