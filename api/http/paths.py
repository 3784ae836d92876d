"""The paths of requests: other spellings of a path that is served, and what a 404 says.

`NormalizedPaths` is falcon middleware and comes first, so that whatever looks at a path sees the one that is routed. Independent
of protocols, apart from the list of endpoints that clients of other servers ask for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import falcon.asgi

_SLASHES = re.compile(r"/{2,}")
_VERSIONS = re.compile(r"^(?:/v1){2,}(?=/|$)")


def normalized(path: str) -> str:
    """A path with single slashes, none at its end, and `/v1` once: clients join a base address and a path in many ways."""
    path = _SLASHES.sub("/", path)
    return _VERSIONS.sub("/v1", path).rstrip("/") or "/"


class NormalizedPaths:
    """Routes each request by its normalized path."""

    async def process_request(self, req: falcon.asgi.Request, _resp: falcon.asgi.Response) -> None:
        req.path = normalized(req.path)


class _Missing(NamedTuple):
    """Endpoints of other servers.

    Attributes:
        pattern: Of their paths, after an optional `/v1`.
        description: What they are, for a sentence.
    """

    pattern: re.Pattern[str]
    description: str


_MISSING = tuple(
    _Missing(re.compile(rf"^(?:/v1)?/(?:{pattern})(?:/|$)"), description)
    for pattern, description in (
        (
            "embeddings|embed|rerank|score|pooling|classify",
            "embeddings and scores, which need models of another kind",
        ),
        ("images", "OpenAI's images"),
        ("audio|realtime", "OpenAI's speech"),
        ("videos", "OpenAI's videos"),
        ("moderations", "OpenAI's moderations"),
        ("messages/batches|batches", "batches of requests"),
        ("files|uploads|containers|skills", "files"),
        ("fine_tuning|fine-tunes|fine_tunes|evals", "fine-tuning and evaluation"),
        ("assistants|threads|vector_stores|chatkit", "OpenAI's assistants, which `/v1/responses` replaces"),
        ("conversations", "OpenAI's conversations"),
        ("responses/compact", "OpenAI's compaction of conversations"),
        ("organization|organizations|projects|dashboard|usage", "the administration of an account"),
        ("complete|edits|engines|answers|search", "an API that its vendor has withdrawn"),
        (
            "api/(?:chat|generate|tags|show|ps|pull|embed|embeddings|version|create|copy|delete|push|blobs)",
            "Ollama's own API",
        ),
        (
            "props|slots|completion|infill|apply-template|lora-adapters|embedding|reranking",
            "llama.cpp's own API",
        ),
        ("api/v[01]|lmstudio-greeting", "LM Studio's own API"),
        (
            "load|version|ping|server_info|get_model_info|generate|metrics|invocations",
            "an API of vLLM's and SGLang's own",
        ),
    )
)


class NotServed:
    """An endpoint that is not served although its path looks like that of an object, such as a stored response's: a 404, not a 405."""

    async def on_get(self, _req: falcon.asgi.Request, _resp: falcon.asgi.Response) -> None:
        raise falcon.HTTPNotFound

    async def on_post(self, _req: falcon.asgi.Request, _resp: falcon.asgi.Response) -> None:
        raise falcon.HTTPNotFound


class NotFound:
    """The message of a 404.

    Args:
        endpoints: What is served, such as ``POST /v1/chat/completions``.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._served = ", ".join(endpoints)

    def message(self, method: str, path: str) -> str:
        """For a path that is not served: what is, and what was asked for, if it is known."""
        missing = next((each for each in _MISSING if each.pattern.match(path)), None)
        about = (
            ""
            if missing is None
            else f" It belongs to {missing.description}, and is not part of this server."
        )
        return f"Unknown request URL: {method} {path}.{about} Served are: {self._served}."
