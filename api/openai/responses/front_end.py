"""`POST /v1/responses` as a front end: its parser, its checks and its rendering."""

from __future__ import annotations

from api.generation.front_end import FrontEnd
from api.generation.request import GenerationRequest
from api.generation.served_model import ServedModel
from api.openai import request_fields
from api.openai.chat import response_format
from api.openai.responses import request as response_request
from api.openai.responses import text_format
from api.openai.responses.rendering import ResponseRendering
from common.errors import RequestError


async def _check(request: GenerationRequest, model: ServedModel) -> None:
    request_fields.check_logit_bias(request.sampling, model)
    try:
        await response_format.check(request.grammar)
    except RequestError as error:
        raise text_format.unsupported(error.message.partition(": ")[2]) from None


RESPONSES = FrontEnd("openai.responses", response_request.parse, _check, ResponseRendering)
