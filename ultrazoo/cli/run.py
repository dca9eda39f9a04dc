"""``ultrazoo train``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrazoo.cli.console import print_json, print_table, say
from ultrazoo.train.signals import nothing_to_save

if TYPE_CHECKING:
    from ultrazoo.config import Config, LoadedConfig


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a field; may be repeated.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|PATH", help="Go on from the run's latest checkpoint (auto), or from this one."),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Begin a new run with the weights of --resume PATH and nothing else.")
    ] = False,
    output_dir: Annotated[
        str | None, typer.Option(metavar="PATH", help="Run folder.", show_default="runs/NAME")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, compiled or reference.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config with the origin of each value, and stop.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the config, build the model, report compute and memory per step, and stop."
        ),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time of a step goes, and write a trace to the run folder.")
    ] = False,
    profile_steps: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST..LAST", help="Steps for --profile, counted from the start or resume.", show_default="20..22"
        ),
    ] = None,
) -> None:
    """Train an encoder as a YAML file or a preset says."""
    from ultrazoo.config import load_config

    if profile_steps and not profile:
        raise typer.BadParameter("--profile-steps acts with --profile only")
    named = {"output_dir": output_dir, "device": device, "kernels": kernels}
    given = [f"training.{name}={json.dumps(value)}" for name, value in named.items() if value is not None]
    loaded = load_config(config, [*(overrides or []), *given])
    for notice in loaded.notices:
        say(f"note: {notice}")
    if print_config:
        print(annotated_yaml(loaded), end="")
        return
    run_dir = Path(loaded.config.training.output_dir or Path("runs") / loaded.name)
    if dry_run:
        _rehearse(loaded.config, run_dir)
        return
    with nothing_to_save():
        from ultrazoo.train import train as train_model
        from ultrazoo.train.profile import parse_steps

        steps = parse_steps(profile_steps or "20..22") if profile else None
        train_model(loaded.config, run_dir=run_dir, resume=resume, weights_only=weights_only, profile=steps)


def resume(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/embbert.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a field; may be repeated.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Train nothing: take the last steps again and compare, bit for bit.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --verify: steps to take again.", show_default="from the checkpoint before the last"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --verify: print the comparison as JSON.")] = False,
) -> None:
    """Go on with a run from its newest whole checkpoint, with its own config.yaml.

    With --verify, exit 0 when weights, optimiser, random numbers, data position and records come out equal to the last
    bit, and 1 when they do not; the run folder is left as it is.
    """
    from ultrazoo.config import load_config
    from ultrazoo.errors import CheckpointError

    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: holds no config.yaml; expected a run folder such as runs/embbert")
    if (steps is not None or as_json) and not verify:
        raise typer.BadParameter("--steps and --json act with --verify only")
    loaded = load_config(run / "config.yaml", overrides or [])
    if not verify:
        with nothing_to_save():
            from ultrazoo.train import train as train_model

            train_model(loaded.config, run_dir=run, resume="auto")
        return
    if overrides:
        raise typer.BadParameter("--set: has no place with --verify, which takes the steps as they were taken")
    from ultrazoo.train.verify import verify_run

    found = verify_run(run, steps=steps, say=say)
    if found is None:  # one of several processes: the first speaks
        return
    if as_json:
        print_json(asdict(found))
    else:
        print_table(
            f"{run}: {found.checkpoints[-1]} again from {found.start or 'the beginning'}",
            ("", "compared", "differ"),
            [(name, f"{count:,}", f"{found.differ.get(name, 0):,}") for name, count in found.compared.items()],
            right=("compared", "differ"),
        )
    say(found.verdict)
    if found.first_difference is not None:
        raise typer.Exit(1)


def annotated_yaml(loaded: LoadedConfig) -> str:
    """Return the resolved config as YAML that loads to the same config, each value with its origin in a comment."""
    lines: list[tuple[str, str]] = []

    def write(section: dict[str, Any], prefix: str, indent: str) -> None:
        for name, value in section.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict) and value:
                lines.append((f"{indent}{name}:", ""))
                write(value, f"{path}.", indent + "  ")
            else:
                lines.append((f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}", loaded.origins[path]))

    write(loaded.config.to_dict(), "", "")
    width = max(len(text) for text, origin in lines if origin and len(text) < 60)
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _rehearse(config: Config, run_dir: Path) -> None:
    """Build the model, run a row on the CPU, and print what was built and what a step costs."""
    import torch

    from ultrazoo.bench.footprint import count_flops, measure_memory
    from ultrazoo.data.finding import find_files, summary
    from ultrazoo.errors import NonFiniteError
    from ultrazoo.model import build_model, parameter_table
    from ultrazoo.ops.library import kernel_policy
    from ultrazoo.train.memory import memory_told
    from ultrazoo.train.optim import build_optimizer
    from ultrazoo.train.run import require_packages

    require_packages(config.training)
    found = find_files(config.training.local_parquet_dir)
    if found.skipped:
        say(f"data: skipped {summary(found.skipped, found.root)}")
    policy = config.training.kernels
    with memory_told(), nullcontext() if policy == "auto" else kernel_policy(policy):
        torch.manual_seed(config.training.seed)
        model = build_model(config.model)
        _, optimizer = build_optimizer(model, config.training)
        table = parameter_table(model)
        length = config.training.max_length
        token_ids = torch.randint(config.model.vocab_size, (1, length))
        output = model(token_ids, labels=token_ids)
        loss = output.loss_sum / output.num_targets
        (loss + sum(output.losses.values())).backward()
        model.zero_grad(set_to_none=True)
        flops, seconds = count_flops(model, config)
        say("measuring the memory of two steps in a process of its own")
        memory = measure_memory(config, seconds)
    if not loss.isfinite():
        raise NonFiniteError(f"the loss of one random row is {loss.item()}, expected a number; see the model section")
    total = sum(count for _, count in table)
    rows = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in table]
    headers = ("part", "parameters", "share")
    print_table("Model", headers, [*rows, ("total", f"{total:,}", "")], right=headers[1:])
    per_step = config.training.batch_size * config.training.gradient_accumulation_steps
    print()
    print_table(
        "Run",
        ("", ""),
        [
            ("run folder", str(run_dir)),
            ("data", f"{len(found.files):,} file(s): {config.training.local_parquet_dir or 'the embedded corpus'}"),
            ("optimiser", optimizer),
            ("tokens per step", f"{per_step} rows x {length} = {per_step * length:,}"),
            ("one random row", f"forwards and backwards, loss {loss.item():.2f}"),
            ("compute per step", f"{flops / 1e9:,.1f} GFLOP, forward and backward"),
            *(memory.table() if memory else [("expected memory", "not measured: this system reports no peak memory")]),
        ],
    )
