"""The setting `MLXPOOL_MODEL_ALIASES`."""

from __future__ import annotations

import time

import pytest

from common.errors import StartupError
from common.models.model_aliases import ModelAliases, parse


def test_plain_and_wildcards() -> None:
    """Spaces around names have no effect; only stars are special."""
    aliases = parse(" fast = org/a , claude-*=b,gpt-?*=c,*=d,")
    assert aliases.plain == {"fast": "org/a"}
    names = ("claude-3", "claude-", "gpt-4", "gpt-?x", "anything", "claude")
    assert [aliases.by_wildcard(name) for name in names] == ["b", "b", "d", "c", "d", "d"]


@pytest.mark.parametrize("text", [None, "", " , "])
def test_none(text: str | None) -> None:
    """Nothing is set."""
    assert parse(text) == ModelAliases()


@pytest.mark.parametrize(
    "text", ["fast", "=b", "fast=", "fast=*", "fast=a,fast=b", "a*=x,a*=y", "fast=a\nb", "a,b=c"]
)
def test_what_is_refused(text: str) -> None:
    """One sentence that names the setting."""
    with pytest.raises(StartupError, match="MLXPOOL_MODEL_ALIASES"):
        parse(text)


def test_a_pattern_of_many_stars_is_fast() -> None:
    """A client's name, however long, cannot keep the API busy."""
    aliases = parse("*a*a*a*=b,**********=c")
    began = time.process_time()
    assert aliases.by_wildcard("a" * 250 + "b") == "b"
    assert aliases.by_wildcard("b" * 250) == "c"
    assert aliases.by_wildcard("b" * 10_000_000) is None
    assert time.process_time() - began < 2.0
