"""The protocols that the API speaks: a front end for each generating endpoint, an error format for each path.

A new endpoint is a new line here. Used by `api.app`, and by `api.server` for errors before there is a request.
"""

from __future__ import annotations

from collections.abc import Mapping

from api.generation.front_end import FrontEnd
from api.http.errors import ErrorFormats
from api.openai.chat.front_end import CHAT_COMPLETIONS
from api.openai.completions.front_end import COMPLETIONS
from api.openai.errors import error_body

FRONT_ENDS: Mapping[str, FrontEnd] = {
    "/chat/completions": CHAT_COMPLETIONS,
    "/completions": COMPLETIONS,
}
"""By path, which is served with and without `/v1` before it."""

ERROR_FORMATS = ErrorFormats(error_body)
"""OpenAI's for all paths; another protocol's paths get its own format, by prefix."""
