"""`POST /v1/chat/completions` as a front end: its parser, its checks and its rendering."""

from __future__ import annotations

from api.generation.front_end import FrontEnd
from api.generation.request import GenerationRequest
from api.generation.served_model import ServedModel
from api.openai.chat import request as chat_request
from api.openai.chat.rendering import ChatRendering
from api.openai.fields import response_format
from api.openai.fields.body import check_token_ids


async def _check(request: GenerationRequest, model: ServedModel) -> None:
    check_token_ids(request.sampling, model)
    await response_format.check(request.grammar, request.grammar_field or "response_format")


CHAT_COMPLETIONS = FrontEnd("openai.chat", chat_request.parse, _check, ChatRendering)
