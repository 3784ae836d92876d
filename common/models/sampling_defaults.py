"""A model's own sampling defaults: what its `generation_config.json` sets, checked as a request is.

A worker reads the file when it loads the model and publishes the result in its card; the API applies them where a request is silent,
as vLLM does. Fields that only transformers uses, such as `do_sample` and `max_new_tokens`, have no effect.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

log = logging.getLogger(__name__)

FILE = "generation_config.json"


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Fields of `common.protocol.SamplingParams`, within the ranges of a request's; None: not set."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None


NAMES = frozenset(SamplingDefaults.__struct_fields__)


def read(folder: Path) -> dict[str, float]:
    """The defaults in a model's folder, by name; empty if it has none. What is out of range is logged and left out."""
    try:
        config = json.loads((folder / FILE).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read: %s", folder / FILE, error)
        return {}
    return checked(config) if isinstance(config, dict) else {}


def checked(config: Mapping[str, Any]) -> dict[str, float]:
    """Those of `config` that are sampling defaults within their range; others are logged and left out."""
    values: dict[str, float] = {}
    for name in SamplingDefaults.__struct_fields__:
        value = config.get(name)
        if value is None:
            continue
        try:
            one = msgspec.convert({name: 0 if (name, value) == ("top_k", -1) else value}, SamplingDefaults)
        except msgspec.ValidationError as error:
            log.warning("%s: %s = %r is ignored: %s", FILE, name, value, error)
        else:
            values[name] = getattr(one, name)
    return values


def to_text(values: Mapping[str, float]) -> str:
    """The value of `ModelCard.sampling_defaults`."""
    return msgspec.json.encode(values).decode() if values else ""


def from_text(text: str) -> dict[str, float]:
    """Decode `ModelCard.sampling_defaults`; Redis is not trusted: what is not a valid default is left out."""
    try:
        return checked(msgspec.json.decode(text, type=dict[str, Any])) if text else {}
    except (msgspec.MsgspecError, RecursionError):
        log.debug("sampling defaults cannot be read: %r", text[:200])
        return {}
