"""A YAML file and ``--set`` overrides -> a validated config, with the origin of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from ultrazoo.arguments import file_path, list_of
from ultrazoo.config import needs
from ultrazoo.config.model import ModelConfig
from ultrazoo.config.overrides import apply_override
from ultrazoo.config.paths import at_home
from ultrazoo.config.problems import ProblemsError, problems_of
from ultrazoo.config.training import TrainingConfig
from ultrazoo.config.yaml import dump_yaml, read_yaml
from ultrazoo.errors import ConfigError, UnknownNameError, did_you_mean
from ultrazoo.options import Options
from ultrazoo.registry import registry


class Config(Options):
    """A whole configuration file."""

    model_config = ConfigDict(protected_namespaces=())

    model_class: Literal["frankenstein", "mini"] = Field(
        "frankenstein", description="mini: factorised embeddings always; frankenstein: as the model section says."
    )
    plugins: dict[str, str] = Field(
        default_factory=dict,
        description="Distribution -> version of the plugins that the blocks come from; filled in when left out.",
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="Shape and parts of the encoder.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Data, optimisation and reports.")

    @model_validator(mode="before")
    @classmethod
    def _settle_names(cls, data: Any) -> Any:
        return needs.with_distributions(data) if isinstance(data, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _mini(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("model_class") == "mini":
            model = data.get("model", {})
            if isinstance(model, dict) and model.get("use_factorized_embedding", False) is False:
                return {**data, "model": {**model, "use_factorized_embedding": True}}
        return data

    @field_validator("plugins")
    @classmethod
    def _installed(cls, plugins: dict[str, str]) -> dict[str, str]:
        lines = [f"plugins.{distribution}: {reason}" for distribution, reason in needs.missing(plugins).items()]
        if lines:
            raise ProblemsError(lines)
        needs.warn_of_others(plugins)
        return plugins

    @model_validator(mode="after")
    def _check(self) -> Config:
        lines = []
        limit = self.model.max_position_embeddings
        if self.model.position_embedding == "learned" and self.training.max_length > limit:
            lines.append(
                f"training.max_length: got {self.training.max_length}, expected at most "
                f"model.max_position_embeddings {limit}; raise that, or shorten the rows"
            )
        if lines:
            raise ProblemsError(lines)
        here = needs.versions()
        # frozen for users; what the model is made of decides
        self.__dict__["plugins"] = {distribution: here[distribution] for distribution in needs.plugins_of(self.model)}
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved values as plain data for YAML or JSON."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the resolved values as YAML that loads to the same config."""
        return dump_yaml(self.to_dict())


@dataclass(frozen=True)
class LoadedConfig:
    """A config, the name of its file, and where each value came from (dotted path -> default, file, command line)."""

    config: Config
    name: str
    origins: dict[str, str]
    notices: list[str]


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a config file or a preset, apply ``path=value`` overrides and validate the whole.

    Args:
        source: Path of a YAML file, or the name of a preset.
        overrides: Items such as ``training.batch_size=8`` or ``model.layer_pattern[1].d_state=8``; values are YAML.

    Raises:
        ConfigError: Every problem of the file and the overrides, one line each.
        ArgumentError: ``source`` is no path, or ``overrides`` is one str and no list.
    """
    items = list_of("overrides", overrides, "overrides such as 'training.batch_size=8'")
    file_path("source", source)
    path = _find(source)
    data = read_yaml(path)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: got {type(data).__name__}, expected sections model_class, plugins, model and training"
        )
    data, moved = at_home(data, path)
    from_file = set(_leaves(data))
    overridden = [apply_override(data, item) for item in items]
    config = config_from_dict(data, str(path))
    changed = {
        path for dotted in overridden for path in _leaves(config.to_dict()) if (path + ".").startswith(dotted + ".")
    }
    origins = {}
    for leaf in _leaves(config.to_dict()):
        given = leaf in from_file or any((leaf + ".").startswith(item + ".") for item in from_file)
        origins[leaf] = "command line" if leaf in changed else "file" if given else "default"
    notices = [
        line
        for line in config.model.notices() + config.training.notices()
        if origins.get(line.split(":")[0]) != "default"
    ]
    if moved and origins["training.output_dir"] != "command line":
        notices.append(moved)
    if config.model_class == "mini" and data.get("model", {}).get("use_factorized_embedding") is False:
        notices.append(
            "model.use_factorized_embedding: false has no effect: model_class mini always factorises; "
            "set model_class to frankenstein for embeddings of full width"
        )
    return LoadedConfig(config=config, name=path.stem, origins=origins, notices=notices)


def config_from_dict(data: Mapping[str, Any], where: str) -> Config:
    """Validate plain data, such as a checkpoint's config.

    Raises:
        ConfigError: Every problem, one line each, under the name ``where``.
    """
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        known: dict[str, Any] = {
            "model_class": {},
            "plugins": {},
            "model": {key: {} for key in ModelConfig.model_fields},
            "training": {key: {} for key in TrainingConfig.model_fields},
        }
        lines = problems_of(error, "", known)
        count = max(len(lines), error.error_count())
        raise ConfigError("\n".join([f"{where}: {count:,} problem(s)", *(f"  {line}" for line in lines)])) from error


def _find(source: str | Path) -> Path:
    path = Path(source)
    if (
        path.is_dir() and str(source) not in registry().presets()
    ):  # beside a preset of the same name, the preset is meant
        raise ConfigError(f"{path}: is a folder, expected a YAML file or the name of a preset")
    if path.exists() and not path.is_dir():
        return path
    try:
        return registry().preset(str(source), "config")
    except UnknownNameError:
        if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
            raise
    presets = registry().presets()
    hint = did_you_mean(path.stem, presets)
    raise ConfigError(f"{path}: no such file; {hint}presets that need no path: {', '.join(presets)}")


def _leaves(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of the values in nested data; an empty mapping is a value."""
    found = []
    for key, value in data.items():
        path = f"{prefix}{key}"
        found += _leaves(value, f"{path}.") if isinstance(value, dict) and value else [path]
    return found
