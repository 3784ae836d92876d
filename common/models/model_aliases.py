"""Other names of models: the setting `MLXPOOL_MODEL_ALIASES`, such as `fast=Qwen3-4B,claude-*=Qwen3-32B,*=Qwen3-4B`.

`api.generation.model_directory` looks names up here that no worker serves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import StartupError

_VARIABLE = "MLXPOOL_MODEL_ALIASES"
_WILDCARD = "*"

MAX_NAME_CHARACTERS = 256
"""Of a name that a wildcard can match: several stars in one pattern take long for a long name."""


@dataclass(frozen=True)
class ModelAliases:
    """See the module.

    Attributes:
        plain: Model ids by alias, of the aliases without a wildcard.
        wildcards: Patterns and model ids, in the order of the setting: the first that matches counts.
    """

    plain: Mapping[str, str] = field(default_factory=dict)
    wildcards: tuple[tuple[re.Pattern[str], str], ...] = ()

    def by_wildcard(self, name: str) -> str | None:
        """The model id of the first wildcard that matches a name."""
        if len(name) > MAX_NAME_CHARACTERS:
            return None
        return next((model for pattern, model in self.wildcards if pattern.fullmatch(name)), None)


def parse(text: str | None) -> ModelAliases:
    """Parse the setting; None or nothing: no aliases.

    Raises:
        StartupError: It is not a list of `alias=model`, or an alias occurs twice.
    """
    plain: dict[str, str] = {}
    patterns: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in (text or "").split(","))):
        alias, equals, model = (part.strip() for part in entry.partition("="))
        if not (alias and equals and model) or not entry.isprintable():
            raise StartupError(f"{_VARIABLE} must be alias=model pairs separated by commas, not {entry!r}")
        if _WILDCARD in model:
            raise StartupError(f"{_VARIABLE}: {entry!r} must name one model after the equals sign, without *")
        kind = patterns if _WILDCARD in alias else plain
        if alias in kind:
            raise StartupError(f"{_VARIABLE} has the alias {alias!r} twice")
        kind[alias] = model
    wildcards = tuple((_compiled(alias), model) for alias, model in patterns.items())
    return ModelAliases(plain, wildcards)


def _compiled(alias: str) -> re.Pattern[str]:
    # Runs of stars are one: several in a row would take exponentially long to not match.
    parts = re.sub(r"\*+", _WILDCARD, alias).split(_WILDCARD)
    return re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
