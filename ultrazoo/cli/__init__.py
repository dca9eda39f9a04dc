"""The command ``ultrazoo``: parse, call, print. Commands import torch only when they need it."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from ultrazoo import __version__, output
from ultrazoo.cli import bench, check, data, inspect, plugins, prove, replay, run, scaffold, use, zoo
from ultrazoo.cli.console import log_to_stderr, print_error, say
from ultrazoo.errors import UltrazooError

SIGNALLED = 128
"""Exit codes above this say which signal ended a run that is whole: no error."""

LONGEST_CAUSE = 400
"""Characters of an unexpected exception that are shown."""
TRACEBACK = "set ULTRAZOO_DEBUG=1 to see the traceback"

SPINS = "1000"
"""How long a thread of libgomp waits awake for the others; read when torch loads. By default it is so long that on a
busy machine waiting threads starve the working ones: a training step took 10 to 40 times as long."""

app = typer.Typer(
    help="Train text encoders from a YAML file, out of blocks that are plugins.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(run.train)
app.command("resume")(run.resume)
app.command("inspect")(inspect.inspect)
app.command("replay")(replay.replay)
app.command("list")(zoo.list_)
app.command("show")(zoo.show)
app.command("schema")(zoo.schema)
app.command("plugins")(plugins.plugins)
app.command("check")(check.check)
app.command("new-plugin")(scaffold.new_plugin)
app.command("parity")(prove.parity)
app.command("doctor")(prove.doctor)
app.command("fill-mask")(use.fill_mask)
app.command("encode")(use.encode)
app.command("plot")(use.plot)
data_app = typer.Typer(help="Prepare training data.", no_args_is_help=True)
data_app.command("convert")(data.convert)
app.add_typer(data_app, name="data")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ultrazoo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Load the built-in plugin alone, here and in every child process.")
    ] = False,
) -> None:
    """Train text encoders from a YAML file, out of blocks that are plugins."""
    if no_plugins:
        os.environ["ULTRAZOO_DISABLE_PLUGINS"] = "all"


def main() -> None:
    """Run the command line; exit 0 when it worked, 1 when it failed, 2 for a wrong call or config, 130 on Ctrl-C.

    An error is one block of text on stderr; ``ULTRAZOO_DEBUG=1`` adds the traceback.
    """
    output.install()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    rank = os.environ.get("RANK", "0")  # set by torchrun
    who = "" if rank == "0" else f"rank {rank}: "
    log_to_stderr(quiet=bool(who))
    try:
        try:
            app(prog_name="ultrazoo")
        finally:
            sys.stdout.flush()
    except Exception as error:
        if os.environ.get("ULTRAZOO_DEBUG", "0") not in ("", "0"):
            traceback.print_exception(error)
        code = error.exit_code if isinstance(error, UltrazooError) else 1
        if code > SIGNALLED:
            say(str(error))
        elif text := _message(error):
            print_error(f"{who}{text}")
        raise SystemExit(code) from error


def _message(error: Exception) -> str:
    """Return the message for the user; empty on a rank that ends because another one, which reports it, failed."""
    if isinstance(error, UltrazooError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error}; {TRACEBACK}"
    first = next(iter(str(error).splitlines()), "")[:LONGEST_CAUSE]
    return f"unexpected {type(error).__name__}: {first or 'no message'}; a bug in ultrazoo or in a plugin; {TRACEBACK}"
