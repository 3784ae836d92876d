"""How the parameters without effect are refused by a strict server."""

from __future__ import annotations

from typing import Any

import pytest

from api.http.body import report_ignored
from api.http.unknown_keys import UnknownKey
from common.errors import RequestError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (UnknownKey("input[0].zzz"), "Unknown parameter: `input[0].zzz`."),
        ("service_tier", "`service_tier` has no effect here."),
    ],
)
def test_a_strict_server_says_which_keys_it_knows(name: str, message: str) -> None:
    """A known parameter is not called unknown; code and param are the same for both."""
    none: Any = None
    with pytest.raises(RequestError) as raised:
        report_ignored(none, none, [name], strict=True)
    error = raised.value
    assert (str(error), error.param, error.code) == (message, name, "unknown_parameter")
