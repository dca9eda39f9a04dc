"""The JSON Schema of a config file, with the blocks of every installed plugin in it."""

from __future__ import annotations

from typing import Any

from ultrazoo.config.load import Config
from ultrazoo.config.model import ModelConfig
from ultrazoo.registry import registry


def json_schema() -> dict[str, Any]:
    """Return a draft-07 schema, the draft that editors' YAML support reads."""
    schema = Config.model_json_schema(ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    fields = definitions["ModelConfig"]["properties"]
    zoo = registry()
    fields["layer_pattern"]["items"] = {"type": "string", "enum": list(zoo.mixers())}
    fields["norm_type"]["enum"] = list(zoo.blocks("norm"))
    fields["ffn_type"]["enum"] = list(zoo.blocks("ffn"))
    options = {}
    for kind in ("mixer", "ffn", "norm"):
        for name, spec in zoo.blocks(kind).items():
            block = spec.config.model_json_schema(ref_template="#/definitions/{model}")
            definitions.update(block.pop("$defs", {}))
            own = {key: value for key, value in block["properties"].items() if key not in ModelConfig.model_fields}
            if own:
                options[name] = {"type": "object", "properties": own, "additionalProperties": False}
    fields["block_options"] = {
        "type": "object",
        "description": fields["block_options"]["description"],
        "properties": options,
        "additionalProperties": False,
        "default": {},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **schema,
        "title": "ultrazoo configuration",
        "definitions": definitions,
    }
