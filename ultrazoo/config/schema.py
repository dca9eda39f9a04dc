"""The JSON Schema of a config file, with the blocks of every installed plugin in it."""

from __future__ import annotations

from typing import Any

from ultrazoo.config.load import Config
from ultrazoo.config.model import ModelConfig
from ultrazoo.registry import registry
from ultrazoo.spec import KINDS, BlockSpec


def json_schema() -> dict[str, Any]:
    """Return a draft-07 schema, the draft that editors' YAML support reads."""
    schema = Config.model_json_schema(ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    definitions.pop("BlockUse")
    fields = definitions["ModelConfig"]["properties"]
    zoo = registry()
    fields["norm_type"]["enum"] = list(zoo.blocks("norm"))
    fields["ffn_type"]["enum"] = [*zoo.blocks("ffn"), "none"]
    fields["embedding_type"]["enum"] = [*zoo.blocks("embedding"), None]
    options = {spec.name: _options(spec, definitions) for kind in KINDS for spec in zoo.blocks(kind).values()}
    fields["layer_pattern"]["items"] = {
        "anyOf": [
            {"type": "string", "enum": list(zoo.mixers())},
            *(_object({"block": {"const": name}, **options[name]}, "block") for name in zoo.mixers()),
        ]
    }
    fields["block_options"] = {
        "type": "object",
        "description": fields["block_options"]["description"],
        "properties": {name: _object(own) for name, own in options.items() if own},
        "additionalProperties": False,
        "default": {},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **schema,
        "title": "ultrazoo configuration",
        "definitions": definitions,
    }


def _options(spec: BlockSpec, definitions: dict[str, Any]) -> dict[str, Any]:
    """Schemas of a block's own options; what they refer to is added to the definitions under the block's name."""
    schema = spec.config.model_json_schema(ref_template=f"#/definitions/{spec.name}.{{model}}")
    definitions.update({f"{spec.name}.{name}": value for name, value in schema.pop("$defs", {}).items()})
    return {name: value for name, value in schema.get("properties", {}).items() if name not in ModelConfig.model_fields}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    needed = {"required": list(required)} if required else {}
    return {"type": "object", "properties": properties, **needed, "additionalProperties": False}
