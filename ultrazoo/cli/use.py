"""``ultrazoo fill-mask``, ``encode`` and ``plot``: what is done with a trained run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from io import TextIOWrapper
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
    r"""Fill \[MASK] in a text: candidates with their probabilities.

    ## marks a token that continues a word, <0xE2> a byte that is no whole character.
    """
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
    """A token as a person reads it: a word bare, one that continues a word after ##, white space in quotes."""
    from ultrazoo.data.words import is_unspaced

    inner = token[:1].isalnum() and not is_unspaced(token[0])
    return f"##{token}" if inner else token.strip() or repr(token)


def encode(
    run: Run,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; none: lines of --file or of standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the texts from this UTF-8 file, one per line.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per line, with text and vector.")] = False,
) -> None:
    """Print the vector of each text, one per line: the mean of the last hidden states.

    A text that is not valid UTF-8 is reported on stderr with its number and skipped; the exit code is then 1.
    """
    if texts and file:
        raise typer.BadParameter("got texts and --file, expected one of them")
    if not texts and not file and sys.stdin.isatty():
        raise typer.BadParameter("got no texts; name them, or use --file, or pipe lines into standard input")
    from ultrazoo.inference import TextError, load, require_text

    encoder = load(run, device)
    where = "text" if texts else f"{file or 'standard input'}: line"
    numbered = enumerate(texts or _lines(file), start=1)
    bad = 0
    while chunk := list(islice(numbered, LINES_AT_ONCE)):
        good = []
        for number, text in chunk:
            try:
                require_text(f"{where} {number}", text)
                good.append(text)
            except TextError as error:
                bad += 1
                say(f"warning: {error}; skipped")
        for text, vector in zip(good, encoder.encode(good).tolist(), strict=True):
            if as_json:
                print(json.dumps({"text": text, "vector": vector}, ensure_ascii=False))
            else:
                print(" ".join(f"{value:.6g}" for value in vector))
    if bad:
        raise DataError(
            f"{where.removesuffix(': line')}: {bad} text(s) skipped, which have no vector; see the warnings"
        )


def _lines(file: Path | None) -> Iterator[str]:
    """Lines of a UTF-8 file or of standard input, without their ends and a byte order mark; other bytes as surrogates.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with nullcontext(sys.stdin.buffer) if file is None else file.open("rb") as source:
            lines = TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape")
            try:
                for line in lines:
                    yield line.rstrip("\r\n")
            finally:
                lines.detach()
    except OSError as error:
        raise DataError(f"{file or 'standard input'}: cannot be read: {error}; expected lines of UTF-8 text") from error


def plot(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG.", show_default="RUN/training.png")] = None,
) -> None:
    """Draw loss, learning rate, gradient norm and tokens per second of a run to a PNG."""
    from ultrazoo.plot import PICTURE, plot_run

    path = plot_run(run, output or run / PICTURE)
    say(f"wrote {path}")
