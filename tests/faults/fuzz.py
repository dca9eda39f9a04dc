"""Ten thousand configs that are presets gone wrong: each is refused in clear words, or builds and trains a row."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from faults.parts import Bench
from faults.process import FaultError, check, fork
from faults.registry import Came, fault

CONFIGS = int(os.environ.get("ULTRAZOO_FAULT_CONFIGS", "10000"))
SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "retention_heads": 2,
    "ffn_hidden_size": 32,
}
SMALL |= {"factorized_embedding_dim": 8, "num_loops": 1, "max_position_embeddings": 64}
VALUES: list[Any] = [
    0, 1, -1, 2, 3, 4, 7, 8, 12, 16, 64, 0.0, 0.5, 1.0, 1.5, -0.1, 1e-9, 1e300, 10**12, 10**400,
    2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1,
    float("nan"), float("inf"), float("-inf"),
    True, False, None, "", "auto", "x" * 300, "none", "[MASK]", "\u0000", "1e-4", [], {}, [1],
    ["retnet"], ["mamba", "ode"],
    ["standard_attn"], ["titan_attn", "titan_attn"], {"a": 1}, [[]], {"retnet": {}}, {"mamba": {"state_size": 4}},
]  # fmt: skip
LIMIT = 512
"""Sizes beyond this are not built: they are valid, and would only measure this machine's memory."""


def mutated(data: dict[str, Any], chance: random.Random, known: dict[str, list[str]]) -> dict[str, Any]:
    """Change one to four things in nested data."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        section = chance.choice(["model", "model", "training", "training", "top"])
        target: Any = data if section == "top" else data.get(section)
        if not isinstance(target, dict):
            continue
        kind = chance.random()
        names = [*target] or ["x"]
        if section != "top":
            names += known[section]
        name = chance.choice(names)
        if kind < 0.35:
            target[name] = chance.choice(VALUES)
        elif kind < 0.62 and not isinstance(target.get(name), str | list | dict):
            target[name] = chance.choice(
                (0, 1, 2, 3, 4, 5, 6, 8, 10, 16, 24, 32, 0.1, 0.25, 0.9, 1.0, True, False, None)
            )
        elif kind < 0.72:
            target.pop(name, None)
        elif kind < 0.8:
            target[name[::-1] if chance.random() < 0.5 else name + "s"] = chance.choice(VALUES)
        elif kind < 0.93 and isinstance(target.get(name), int | float):
            target[name] = target[name] * chance.choice([-1, 0.5, 2, 3, 1000])
        elif section == "model":
            pattern = [chance.choice([*known["mixers"], "retnt"]) for _ in range(chance.randint(0, 3))]
            target["layer_pattern"] = pattern
    return data


def scrambled(text: str, chance: random.Random) -> str:
    """Change characters and lines of a file."""
    lines = text.splitlines()
    for _ in range(chance.randint(1, 3)):
        row = chance.randrange(len(lines))
        kind = chance.random()
        if kind < 0.25:
            del lines[row]
            lines = lines or [""]
        elif kind < 0.45:
            lines.insert(row, chance.choice(lines))
        elif kind < 0.6:
            lines[row] = chance.choice(["  ", "\t", "- ", "!!python/name:os.system ", "&a *a", "'"]) + lines[row]
        else:
            at = chance.randrange(len(lines[row]) + 1)
            extra = chance.choice(
                ["\x00", ":", "{", "]", "é", "\ud7ff", "#", "\n", " ", "99999999999999999999", "|", "%", "\x85"]
            )
            lines[row] = lines[row][:at] + extra + lines[row][at + chance.randint(0, 3) :]
    return "\n".join(lines) + "\n"


def plan(training: Any) -> None:
    """Compute what a run derives from the training section before its first step."""
    import numpy as np

    from ultrazoo.data.plan import Plan
    from ultrazoo.train.runtime import seed_everything
    from ultrazoo.train.schedule import make_plan

    seed_everything(training.seed)
    make_plan(training, 1000).learning_rate(0, 0.0, 0.0)
    rows = np.array([1000, 1, 300])
    Plan(rows, training.dataset_batch_size, training.seed, training.shuffle, training.stream_local_parquet).epoch(0)


def rehearse(config: Any, built: dict[str, bool]) -> str:
    """Build the model of a valid config and train it on one row, as ``--dry-run`` does; say what became of it."""
    import torch

    from ultrazoo.errors import UltrazooError
    from ultrazoo.model import build_model

    plan(config.training)
    model = config.model
    sizes = [
        model.vocab_size,
        model.hidden_size,
        model.ffn_hidden_size,
        model.max_position_embeddings,
        model.num_layers,
    ]
    sizes += [
        model.num_experts,
        model.factorized_embedding_dim,
        model.num_loops * model.num_layers * 8,
        model.ode_steps * 8,
    ]
    sizes += [model.embedding_conv_kernel, config.training.max_length]
    sizes += [size for option in model.block_options.values() for size in option.values() if isinstance(size, int)]
    if max(sizes) > LIMIT:
        return "valid, too large to build here"
    key = model.model_dump_json()
    if key in built:
        return "valid, built as before"
    built[key] = True
    try:
        network = build_model(model)
        ids = torch.randint(model.vocab_size, (1, min(config.training.max_length, 16)))
        output = network(ids, labels=ids)
        (output.loss_sum / output.num_targets + sum(output.losses.values())).backward()
    except UltrazooError:
        return "refused when built"
    return "valid, built and trained a row"


def fuzz(count: int, seed: int) -> Counter[str]:
    """Try so many configs; any error but a ConfigError is a traceback and a failure."""
    import yaml as pyyaml

    from ultrazoo.config import Config, config_from_dict
    from ultrazoo.config.load import load_config
    from ultrazoo.config.model import ModelConfig
    from ultrazoo.config.training import TrainingConfig
    from ultrazoo.config.yaml import dump_yaml, parse_yaml
    from ultrazoo.errors import ConfigError
    from ultrazoo.registry import registry

    chance, found, built = random.Random(seed), Counter[str](), dict[str, bool]()
    known = {
        "model": [*ModelConfig.model_fields],
        "training": [*TrainingConfig.model_fields],
        "mixers": [*registry().mixers()],
    }
    bases = []
    for preset in registry().presets().values():
        data = parse_yaml(preset.path.read_text(), preset.name)
        data["model"] = {**data.get("model", {}), **SMALL}
        data["training"] = {**(data.get("training") or {}), "max_length": 16}
        bases.append((preset.name, preset.path.read_text(), data))
    for number in range(count):
        name, text, data = chance.choice(bases)
        what: Any = None
        try:
            if number % 5 == 4:
                what = scrambled(text, chance)
                parsed = parse_yaml(what, name)
                config = config_from_dict(parsed, name) if isinstance(parsed, dict) else None
                if config is None:
                    raise ConfigError("not a mapping")
            else:
                what = mutated(data, chance, known)
                config = config_from_dict(what, name)
                again = (
                    config_from_dict(parse_yaml(dump_yaml(config.to_dict()), name), name)
                    if number % 10 == 0
                    else config
                )
                check(again == config, f"written and read it is another config: {what}")
            if number % 50 == 0:
                Path("fuzz.yaml").write_text(pyyaml.safe_dump(data))
                plan(load_config("fuzz.yaml", ["training.seed=" + str(chance.choice(VALUES))]).config.training)
            assert isinstance(config, Config)
            config.model.notices(), config.training.notices()
            found[rehearse(config, built)] += 1
        except ConfigError as error:
            told = str(error)
            check(told.strip() and not re.search(r"Traceback|pydantic_core|object at 0x", told), f"unclear: {told}")
            found["refused"] += 1
        except FaultError:
            raise
        except Exception as error:
            raise FaultError(f"{type(error).__name__}: {error} from {what!r}") from error
    return found


def fuzzed(folder: Path, count: int, seed: int) -> Came:
    def body() -> None:
        os.chdir(folder)
        for name, number in fuzz(count, seed).items():
            print(f"{number}\t{name}")

    ended = fork(folder, body).wait(400).expect(0)
    rows = [line.split("\t") for line in ended.out.splitlines()]
    outcomes = ", ".join(f"{int(number):,} {name}" for number, name in sorted(rows, key=lambda row: -int(row[0])))
    return Came(f"{count:,} configs: {outcomes}; no traceback", "nothing")


@fault("31a", "fuzzed configs, first half", limit=400)
def first_half(bench: Bench, folder: Path) -> Came:
    return fuzzed(folder, (CONFIGS + 1) // 2, 11)


@fault("31b", "fuzzed configs, second half", limit=400)
def second_half(bench: Bench, folder: Path) -> Came:
    return fuzzed(folder, CONFIGS // 2, 12)


@fault("31q", "300 fuzzed configs", quick=True)
def few(bench: Bench, folder: Path) -> Came:
    return fuzzed(folder, 300, 13)
