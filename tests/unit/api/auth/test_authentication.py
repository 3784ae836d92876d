"""The headers that carry an API key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from api import keys
from api.auth import key_file
from api.auth.authentication import Authentication
from common.errors import RequestError

WRONG = "sk-" + "x" * 48


@pytest.fixture
def checked(tmp_path: Path) -> Any:
    """Authenticates a request with these headers; returns the name of its key, or the status of the refusal."""
    secret = keys.add(tmp_path / "keys", "ann")
    authentication = Authentication(key_file.opened(tmp_path / "keys"))

    def run(**headers: str) -> str:
        sent = {name.replace("_", "-"): value.format(key=secret) for name, value in headers.items()}
        req = SimpleNamespace(
            path="/v1/models",
            method="GET",
            get_header=sent.get,
            context=SimpleNamespace(request_id="r", api_key_name=None),
        )
        resp = SimpleNamespace(set_header=lambda *_: None)
        try:
            asyncio.run(authentication.process_request(cast("Any", req), cast("Any", resp)))
        except RequestError as error:
            return str(error.status)
        return str(req.context.api_key_name)

    return run


def test_either_header_authenticates(checked: Any) -> None:
    """A bearer token or `X-Api-Key`; if both are sent, one of them has to be valid."""
    assert checked(authorization="Bearer {key}") == "ann"
    assert checked(x_api_key="{key}") == "ann"
    assert checked(x_api_key=" {key} ") == "ann"
    assert checked(authorization=f"Bearer {WRONG}", x_api_key="{key}") == "ann"
    assert checked(authorization="Bearer {key}", x_api_key="none") == "ann"


def test_other_headers_do_not(checked: Any) -> None:
    """Neither a wrong key nor an empty one, and not another scheme."""
    assert checked() == "401"
    assert checked(x_api_key="") == "401"
    assert checked(x_api_key=WRONG) == "401"
    assert checked(authorization="Basic {key}") == "401"
    assert checked(authorization=f"Bearer {WRONG}", x_api_key=WRONG) == "401"
