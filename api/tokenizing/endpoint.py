"""What the endpoints that only tokenize share: they read a body, name what has no effect in it, and find the model.

The protocols' falcon resources are its subclasses. Must not know any one protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import falcon.asgi

from api.generation.served_model import ModelLookup, ServedModel
from api.http.body import parsed, read_json, report_ignored
from api.tokenizing.counting import Tokenizing
from common.settings import Settings

T = TypeVar("T")


class TokenizingEndpoint:
    """See the module."""

    def __init__(self, models: ModelLookup, tokenizing: Tokenizing, settings: Settings) -> None:
        self._lookup = models
        self._tokenizing = tokenizing
        self._settings = settings

    async def _read(self, req: falcon.asgi.Request, parse: Callable[[bytes], T]) -> T:
        """The parsed body.

        Raises:
            RequestError: As `read_json` and `parse`.
        """
        return await parsed(await read_json(req, self._settings), parse)

    async def _model(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, ignored: list[str], name: str | None
    ) -> ServedModel:
        """The model that the request names.

        Raises:
            RequestError: As `report_ignored` and `ModelLookup.resolve`.
        """
        report_ignored(req, resp, ignored, strict=self._settings.strict_parameters)
        return await self._lookup.resolve(name)
