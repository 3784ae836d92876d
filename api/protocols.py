"""The protocols that the API speaks: a front end for each generating endpoint, an error format for each path.

A new endpoint is a new line here. Used by `api.app`, and by `api.server` for errors before there is a request.
"""

from __future__ import annotations

from collections.abc import Mapping

from api.anthropic import errors as anthropic_errors
from api.anthropic.messages.front_end import MESSAGES
from api.generation.front_end import FrontEnd
from api.http.errors import ErrorFormat, ErrorFormats
from api.openai import errors as openai_errors
from api.openai.chat.front_end import CHAT_COMPLETIONS
from api.openai.completions.front_end import COMPLETIONS
from api.openai.responses.errors import response_error_body
from api.openai.responses.front_end import RESPONSES

ANTHROPIC_HEADER = "anthropic-version"
"""Which all of Anthropic's clients send."""

MESSAGES_PATH, RESPONSES_PATH = "/messages", "/responses"

FRONT_ENDS: Mapping[str, FrontEnd] = {
    "/chat/completions": CHAT_COMPLETIONS,
    "/completions": COMPLETIONS,
    RESPONSES_PATH: RESPONSES,
    MESSAGES_PATH: MESSAGES,
}
"""By path, which is served with and without `/v1` before it."""

_OPENAI = ErrorFormat(openai_errors.error_body)
_RESPONSES = ErrorFormat(response_error_body)
_ANTHROPIC = ErrorFormat(anthropic_errors.error_body, anthropic_errors.status)
_BY_PATH = {MESSAGES_PATH: _ANTHROPIC, RESPONSES_PATH: _RESPONSES}

ERROR_FORMATS = ErrorFormats(
    _OPENAI,
    {prefix + path: _BY_PATH.get(path, _OPENAI) for path in FRONT_ENDS for prefix in ("/v1", "")},
    {ANTHROPIC_HEADER: _ANTHROPIC},
)
"""Anthropic's below its path, and at paths of both protocols, such as that of the models, if its version header is sent."""
