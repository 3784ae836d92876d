"""`POST /v1/messages` as a front end: its parser, its checks and its rendering."""

from __future__ import annotations

import asyncio

from api.anthropic.messages import request as messages_request
from api.anthropic.messages.rendering import MessageRendering
from api.generation.front_end import FrontEnd
from api.generation.request import GenerationRequest
from api.generation.served_model import ServedModel
from common.errors import invalid
from common.schema import grammar


async def _check(request: GenerationRequest, _model: ServedModel) -> None:
    """Compile what a worker is going to compile, on another thread: some schemas take tens of milliseconds."""
    if request.grammar is not None and (complaint := await asyncio.to_thread(grammar.check, request.grammar)):
        raise invalid(
            f"`output_config.format.schema` is not supported: {complaint}", "output_config.format.schema"
        )


MESSAGES = FrontEnd("anthropic.messages", messages_request.parse, _check, MessageRendering)
