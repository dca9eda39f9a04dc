"""Every preset: its exact size, part by part and against the papers', and one step at reduced width."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ultrazoo.config import Config, LoadedConfig, load_config
from ultrazoo.config.yaml import parse_yaml
from ultrazoo.model import MaskedLM, build_model, parameter_table

CONFIGS = Path(__file__).parents[1] / "configs"
README = (CONFIGS / "README.md").read_text(encoding="utf-8")
PRESETS = ("embbert", "frankenstein", "mini", "standard", "standard_hope", "tinybert", "tinybert6")
SMALL = {
    "frankenstein": ["hidden_size=64", "ffn_hidden_size=32", "num_layers=6"],
    "mini": ["hidden_size=48", "ffn_hidden_size=32", "factorized_embedding_dim=16"],
    "standard": ["hidden_size=48", "ffn_hidden_size=96", "num_layers=3"],
    "standard_hope": ["hidden_size=48", "ffn_hidden_size=96", "num_layers=3"],
    "tinybert": ["hidden_size=48", "ffn_hidden_size=96"],
    "tinybert6": ["hidden_size=48", "ffn_hidden_size=96"],
    "embbert": [],
}
TOTALS = {
    "embbert": 945_216,
    "frankenstein": 340_461_805,
    "mini": 26_999_992,
    "standard": 109_512_762,
    "standard_hope": 132_335_514,
    "tinybert": 14_380_770,
    "tinybert6": 66_985_530,
}


def build(loaded: LoadedConfig) -> MaskedLM:
    return build_model(loaded.config.model)


def full_size(name: str) -> MaskedLM:
    with torch.device("meta"):
        return build(load_config(name))


# Parameters of one block, from the equations. bitnet: each BitLinear's norm has a gain per input channel.


def attention(D: int, bitnet: bool = False) -> int:
    return 4 * D * D + 4 * D + bitnet * 2 * D


def titan(D: int, H: int, bitnet: bool = False) -> int:
    persistent, norms, convolutions = 4 * D, 2 * D, 3 * 3 * D
    memory = 3 * D * D + 6 * H * (D + 1) + 2 * D * (D // H)
    return attention(D, bitnet) + persistent + norms + convolutions + memory + bitnet * D


def retnet(D: int, bitnet: bool = False) -> int:
    return 2 * D * D + 3 * D * 2 * D + bitnet * (4 * D + 2 * D)


def mamba(D: int, bitnet: bool = False, N: int = 16, W: int = 4) -> int:
    inner, R = 2 * D, -(-D // 16)
    one_way = inner * (W + 1) + inner * (R + 2 * N) + R * inner + inner + inner * N + inner
    return 2 * D * inner + 2 * one_way + inner * D + bitnet * (D + inner)


def mlp(D: int, F: int) -> int:
    return 2 * D * F + F + D


def moe(D: int, F: int, E: int = 4, bitnet: bool = False) -> int:
    return E * mlp(D, F) + E * D + bitnet * E * (D + F)


def bert(V: int, D: int, L: int, F: int) -> dict[str, int]:
    """A BERT without token types, pooler and next-sentence head."""
    return {
        "token embeddings": V * D,
        "position embeddings": 512 * D,
        "embedding norm": 2 * D,
        "layer norms": L * 4 * D,
        f"mixer standard_attn (x {L})": L * attention(D),
        f"ffn mlp (x {L})": L * mlp(D, F),
        "head transform": D * D + D,
        "head norm": 2 * D,
        "head bias": V,
    }


def hybrid(V: int, D: int, H: int, L: int, F: int, E: int, per_norm: int, bitnet: bool) -> dict[str, int]:
    """The pattern [retnet, titan_attn, retnet, mamba, titan_attn, ode] over L layers; E: width of the token table."""
    sixth = L // 6
    return {
        "token embeddings": V * E,
        "embedding scales": 1,
        "embedding norm": 2 * D + per_norm,
        "layer norms": L * 2 * (2 * D + per_norm),
        f"mixer retnet (x {2 * sixth})": 2 * sixth * retnet(D, bitnet),
        f"mixer titan_attn (x {2 * sixth})": 2 * sixth * titan(D, H, bitnet),
        f"mixer mamba (x {sixth})": sixth * mamba(D, bitnet),
        f"mixer ode (x {sixth})": sixth * attention(D, bitnet),
        f"ffn moe (x {L})": L * moe(D, F, bitnet=bitnet),
        "final norm": 2 * D + per_norm,
        "head transform": D * E + E,
        "head scale": 1,
        "head norm": 2 * E + per_norm,
        "head bias": V,
    }


PARTS = {
    "standard": bert(30522, 768, 12, 3072),
    "tinybert": bert(30522, 312, 4, 1200),
    "tinybert6": bert(30522, 768, 6, 3072),
    "frankenstein": hybrid(50000, 1024, 16, 12, 2048, E=1024, per_norm=1, bitnet=True),
    "mini": hybrid(50000, 384, 6, 6, 768, E=128, per_norm=2, bitnet=False)
    | {"embedding convolution": 128 * 128 * 3 + 128, "embedding projection": 128 * 384},
    "embbert": bert(8192, 128, 4, 512)
    | {
        "token embeddings": 8192 * 16,
        "embedding convolution": 16 * 16 * 32 + 16,
        "embedding projection": 16 * 128,
        "position embeddings": 0,
        "final norm": 2 * 128,
        "head transform": 128 * 16 + 16,
        "head norm": 2 * 16,
    },
    "standard_hope": bert(30522, 768, 12, 3072)
    | {
        "position embeddings": 0,
        "mixer standard_attn (x 12)": 0,
        "mixer titan_attn (x 12)": 12 * titan(768, 12),
    },
}


def test_these_are_all_presets():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_exact_size_part_by_part(name):
    model = full_size(name)
    assert dict(parameter_table(model)) == {part: count for part, count in PARTS[name].items() if count}
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTALS[name]


def test_standard_is_berts_masked_lm_without_token_types():
    assert TOTALS["standard"] == 109_514_298 - 2 * 768


@pytest.mark.parametrize(("name", "published", "D"), [("tinybert", 14_350_248, 312), ("tinybert6", 66_955_008, 768)])
def test_tinybert_is_the_papers_student_with_a_head_in_place_of_the_pooler(name, published, D):
    token_types, pooler, head = 2 * D, D * D + D, D * D + D + 2 * D + 30522
    assert TOTALS[name] == published - token_types - pooler + head


def test_embbert_fits_two_megabytes_at_int8():
    assert TOTALS["embbert"] < 2_000_000


@pytest.mark.parametrize("name", PRESETS)
def test_training_section_needs_no_local_files_and_fits_training_from_scratch(name):
    loaded = load_config(CONFIGS / f"{name}.yaml")
    training = loaded.config.training
    assert training.local_parquet_dir is None and training.tokenizer is None and training.cache_dir is None
    highest = 3e-3 if name == "embbert" else 1e-3  # 128 wide, minutes of training: measured, see the file
    assert 5e-4 <= training.learning_rate <= highest
    assert loaded.notices == []  # nothing is set that has no effect
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=./ultrazoo.schema.json"
    assert lines[1].startswith("# ") and len(lines[1]) > 40


@pytest.mark.parametrize("name", PRESETS)
def test_one_step_at_reduced_width(name):
    torch.manual_seed(0)
    model = build(load_config(name, [f"model.{item}" for item in [*SMALL[name], "vocab_size=160"]]))
    ids = torch.randint(5, 160, (3, 40))
    segments = torch.tensor([[1] * 40, [1] * 13 + [2] * 27, [1] * 30 + [0] * 10])
    chosen = (torch.rand(3, 40) < 0.3) & segments.ne(0)
    output = model(ids, segments, ids.masked_fill(~chosen, -100))
    loss = output.loss_sum / output.num_targets
    assert loss.isfinite() and abs(loss.item() - torch.tensor(160.0).log().item()) < 1.5
    (loss + sum(output.losses.values())).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert output.hidden[segments.eq(0)].eq(0).all()


def test_the_readme_has_every_field_with_its_default():
    rows = re.findall(r"^\| `(\w+)`(?: \*new\*)? \| .*? \| `([^`]*)` \| ", README, flags=re.MULTILINE)
    documented = {name: parse_yaml(default, name) for name, default in rows}
    defaults = Config().to_dict()
    resolved_later = {"position_embedding": None}
    whole = {name: defaults[name] for name in ("model_class", "plugins")}
    expected = {**whole, **defaults["model"], **defaults["training"], **resolved_later}
    assert len(rows) == len(documented)
    assert documented == expected


def test_the_readme_has_the_exact_sizes():
    cells = [[cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in README.splitlines() if line[:2] == "| "]
    assert {row[0]: row[7] for row in cells if row[0] in PRESETS} == {n: f"{count:,}" for n, count in TOTALS.items()}
    start = next(i for i, row in enumerate(cells) if row[0] == "part")
    names, table = cells[start][1:], cells[start + 1 :]
    table = table[: next(i for i, row in enumerate(table) if row[0] == "sum") + 1]
    for column, name in enumerate(names, start=1):
        counts = {re.sub(r" \(x \d+\)$", "", part): count for part, count in PARTS[name].items() if count}
        shown = {row[0]: row[column] for row in table if row[column] != "-"}
        assert shown == {part: f"{count:,}" for part, count in (counts | {"sum": TOTALS[name]}).items()}
