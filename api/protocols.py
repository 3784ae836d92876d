"""The protocols that the API speaks: a front end for each generating endpoint, an error format for each path.

A new endpoint is a new line here. Used by `api.app`, and by `api.server` for errors before there is a request.
"""

from __future__ import annotations

from collections.abc import Mapping

from api.anthropic import errors as anthropic_errors
from api.generation.front_end import FrontEnd
from api.http.errors import ErrorFormat, ErrorFormats
from api.openai import errors as openai_errors
from api.openai.chat.front_end import CHAT_COMPLETIONS
from api.openai.completions.front_end import COMPLETIONS

ANTHROPIC_HEADER = "anthropic-version"
"""Which all of Anthropic's clients send."""

MESSAGES_PATH = "/messages"

FRONT_ENDS: Mapping[str, FrontEnd] = {
    "/chat/completions": CHAT_COMPLETIONS,
    "/completions": COMPLETIONS,
}
"""By path, which is served with and without `/v1` before it."""

_OPENAI = ErrorFormat(openai_errors.error_body)
_ANTHROPIC = ErrorFormat(anthropic_errors.error_body, anthropic_errors.status)

ERROR_FORMATS = ErrorFormats(
    _OPENAI,
    {
        prefix + path: _ANTHROPIC if path == MESSAGES_PATH else _OPENAI
        for path in (*FRONT_ENDS, MESSAGES_PATH)
        for prefix in ("/v1", "")
    },
    {ANTHROPIC_HEADER: _ANTHROPIC},
)
"""Anthropic's below its path, and at paths of both protocols, such as that of the models, if its version header is sent."""
