"""``ultrazoo data``: prepare training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultrazoo.cli.console import say


def convert(
    inputs: Annotated[list[Path], typer.Argument(help="Text (.txt) or JSON Lines (.jsonl) files, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    text_key: Annotated[str, typer.Option(help="Where a JSON object holds its text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Convert text to Parquet. Blank lines separate the documents of a .txt file; each line of a .jsonl file is one.

    In folders, names that begin with . or _ are skipped; each file is read once, however many links lead to it.
    """
    from ultrazoo.data.convert import convert_to_parquet

    done = convert_to_parquet(inputs, output, text_key=text_key, overwrite=overwrite, console=say)
    for note in done.notes:
        say(f"note: {note}")
    for reason, count in done.skipped.items():
        say(f"skipped: {count:,} {reason}")
    say(f"wrote {done.rows:,} documents, {done.bytes / 1e6:.1f} MB of text from {done.files:,} file(s), to {output}")
