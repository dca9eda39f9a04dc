"""``ultrazoo fill-mask``, ``encode`` and ``plot``: what is done with a trained run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from ultrazoo.cli.console import print_json, print_table, say
from ultrazoo.errors import DataError

LINES_AT_ONCE = 256

Run = Annotated[Path, typer.Argument(help="A run folder (its best checkpoint, else its latest), or a checkpoint.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]


def fill_mask(
    run: Run,
    text: Annotated[str, typer.Argument(help=r"A text with \[MASK] in it, once or more often.")],
    top_k: Annotated[int, typer.Option(min=1, help="Candidates for each mask.")] = 5,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of candidates for each mask.")] = False,
) -> None:
    r"""Fill \[MASK] in a text: candidates with their probabilities. ## marks the inner part of a word."""
    from ultrazoo.inference import load

    filled = load(run, device).fill_mask(text, top_k)
    if as_json:
        print_json(
            [
                [{"token": c.token, "probability": c.probability, "token_id": c.token_id} for c in candidates]
                for candidates in filled
            ]
        )
        return
    for number, candidates in enumerate(filled, start=1):
        title = text if len(filled) == 1 else f"{text}  (mask {number} of {len(filled)})"
        rows = [(f"{candidate.probability:.2%}", _shown(candidate.token)) for candidate in candidates]
        print_table(title, ("probability", "token"), rows, right=("probability",))


def _shown(token: str) -> str:
    """A token as a person reads it: a word bare, the inner part of a word after ##, white space in quotes."""
    return f"##{token}" if token[:1].isalnum() else token.strip() or repr(token)


def encode(
    run: Run,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; none: lines of --file or of standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the texts from this file, one a line.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line, with text and vector.")] = False,
) -> None:
    """Print the vector of each text, one a line: the mean of the last hidden states."""
    if texts and file:
        raise typer.BadParameter("got texts and --file, expected one of them")
    if not texts and not file and sys.stdin.isatty():
        raise typer.BadParameter("got no texts; name them, or use --file, or pipe lines into standard input")
    from ultrazoo.inference import load

    encoder = load(run, device)
    lines = iter(texts) if texts else _lines(file)
    while chunk := list(islice(lines, LINES_AT_ONCE)):
        for text, vector in zip(chunk, encoder.encode(chunk).tolist(), strict=True):
            if as_json:
                print(json.dumps({"text": text, "vector": vector}, ensure_ascii=False))
            else:
                print(" ".join(f"{value:.6g}" for value in vector))


def _lines(file: Path | None) -> Iterator[str]:
    """Lines of a file or of standard input, without their ends."""

    def stripped(lines: Iterable[str]) -> Iterator[str]:
        return (line.rstrip("\r\n") for line in lines)

    if file is None:
        yield from stripped(sys.stdin)
        return
    try:
        with file.open(encoding="utf-8") as opened:
            yield from stripped(opened)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file: {file}: cannot be read: {error}; expected lines of UTF-8 text") from error


def plot(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG.", show_default="RUN/training.png")] = None,
) -> None:
    """Draw loss, learning rate, gradient norm and tokens per second of a run to a PNG."""
    from ultrazoo.plot import PICTURE, plot_run

    path = plot_run(run, output or run / PICTURE)
    say(f"wrote {path}")
