"""``ultrazoo replay``: look into a step whose loss or gradient was not finite."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrazoo.cli.console import print_json, print_table, say

if TYPE_CHECKING:
    from ultrazoo.train.examine import Finding
    from ultrazoo.train.replay import Replay

UNEXPLAINED = 1


def replay(
    flight: Annotated[Path, typer.Argument(help="A flight record, such as runs/embbert/flight/step-000123.")],
    kernels: Annotated[
        str | None, typer.Option(help="auto, compiled or reference.", show_default="as in the training")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float64, or mixed bfloat16 or float16.", show_default="as in the training"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N or mps.", show_default="as in the training, if it is here")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a recorded step again and name the module and operator whose result stopped being finite.

    Exit 0 when the fault came again or is gone on another backend, dtype or device; exit 1 when nothing was changed
    and everything is finite.
    """
    from ultrazoo.train.replay import replay as run_again

    done = run_again(flight, kernels=kernels, dtype=dtype, device=device)
    if as_json:
        print_json(_as_data(done))
    else:
        _print(done)
    if not done.explained:
        raise typer.Exit(UNEXPLAINED)


def _print(done: Replay) -> None:
    seen = done.seen
    print_table(
        f"Step {done.step}",
        ("", "computed by", "loss", "gradient norm"),
        [
            ("training", done.recorded, done.loss, done.norm),
            ("replay", done.runs, f"{seen.loss:g}", f"{seen.norm:g}"),
        ],
        right=("loss", "gradient norm"),
    )
    if seen.way:
        print()
        headers = ("pass", "module", "operator", "NaN", "infinite", "of", "dtype", "largest argument")
        rows = [
            (
                f.direction,
                f.module,
                f.op,
                f"{f.nan:,}",
                f"{f.inf:,}",
                f"{f.size:,}",
                f.dtype,
                f"{f.largest_input:.3g}" if f.largest_input else "",
            )
            for f in seen.way
        ]
        print_table("From its origin to the loss or gradient", headers, rows, right=headers[3:6] + headers[7:])
    print()
    blocks = list(dict.fromkeys([*seen.activations, *seen.gradients]))
    print_table(
        "Blocks",
        ("block", "largest output", "mean |output|", "not finite", "gradient norm"),
        [(block, *_of_block(seen.activations.get(block, {}), seen.gradients.get(block, {}))) for block in blocks],
        right=("largest output", "mean |output|", "not finite", "gradient norm"),
    )
    if seen.overflow is not None:
        say(f"first infinity: {seen.overflow}")
    if seen.origin is not None:
        say(f"{'first NaN' if seen.origin.nan else 'first infinity'}: {seen.origin}")
    say(done.verdict)


def _of_block(output: dict[str, float], gradient: dict[str, float]) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        number(output.get("max"), ".3g"),
        number(output.get("mean_abs"), ".3g"),
        number(output.get("not_finite"), ",.0f"),
        number(gradient.get("norm"), ".3g"),
    )


def _as_data(done: Replay) -> dict[str, Any]:
    """The replay as JSON values; numbers that are not finite become text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return f"{value:g}" if isinstance(value, float) and value - value != 0 else value

    def finding(found: Finding | None) -> dict[str, Any] | None:
        return None if found is None else {key: value for key, value in asdict(found).items() if key != "reads"}

    seen = done.seen
    return {
        "step": done.step,
        "recorded": {**done.recorded._asdict(), "loss": done.loss, "gradient_norm": done.norm},
        "replay": plain({**done.runs._asdict(), "loss": seen.loss, "gradient_norm": seen.norm}),
        "finite": seen.finite,
        "verdict": done.verdict,
        "origin": finding(seen.origin),
        "overflow": finding(seen.overflow),
        "way": [finding(found) for found in seen.way],
        "activations": plain(seen.activations),
        "gradients": plain(seen.gradients),
    }
