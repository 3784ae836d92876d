"""What contract tests share: the parameters of a library's function, as this project passes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters, without `self` and `cls`."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def accepts(function: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
    """Whether a function can be called like this."""
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError:
        return False
    return True
