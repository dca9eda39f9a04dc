"""The YAML dialect: what people write is what they get."""

import pytest

from ultrazoo.config.yaml import dump_yaml, parse_yaml
from ultrazoo.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2", -2),
        ("010", 10),
        ("0x1F", 31),
        ("1_000", 1000),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("'1'", "1"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    got = parse_yaml(f"x: {text}", "file")["x"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"file:2:1: key 'a' appears twice"),
        ("m: {b: 1, b: 2}", r"file:1:11: key 'b' appears twice"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: [", "file:1:5"),
        ("--- 1\n--- 2", "another document"),
        ("1: 2", "key 1 is not text"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_place(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "file")


def test_what_is_written_reads_back():
    data = {"a": "3e-4", "b": "on", "c": 3e-4, "d": True, "e": None, "f": "010", "g": [1, "x: y"], "h": "", "i": "ñ"}
    assert parse_yaml(dump_yaml(data), "file") == data
