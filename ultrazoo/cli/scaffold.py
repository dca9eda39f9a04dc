"""``ultrazoo new-plugin``: the files of a plugin that works, to be changed into another one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ultrazoo.cli.console import say


def new_plugin(
    name: Annotated[
        str,
        typer.Argument(
            help="Of the plugin, its block and its ops: my-mixer makes the distribution ultrazoo-my-mixer, the module "
            "ultrazoo_my_mixer, the block my_mixer and the folder my-mixer."
        ),
    ],
    mixer: Annotated[bool, typer.Option("--mixer", help="With a block, and a preset that trains it.")] = False,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="With an op: reference, gradient and a C++ kernel, built at first use.")
    ] = False,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder in which that of the plugin is made.", show_default="this one")
    ] = Path(),
) -> None:
    """Write a distribution that installs, passes its tests and trains at once; without options it has a mixer alone."""
    from ultrazoo.scaffold.render import names_of, render, taken_names, write

    names = names_of(name, taken_names())
    mixer = mixer or not kernel
    folder = output / names.folder
    write(folder, render(names, mixer=mixer, kernel=kernel))
    say(f"wrote {folder}: {names.distribution}, module {names.module}")
    where = shlex.quote(str(folder) if folder.is_absolute() else f"./{folder}")
    say(f"next: pip install -e {where} && ultrazoo check {names.name}")
    if mixer:
        say(f"then: ultrazoo train {names.name}")
