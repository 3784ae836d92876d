"""`POST /v1/responses` as a front end: its parser, its checks and its rendering."""

from __future__ import annotations

from api.generation.front_end import FrontEnd
from api.generation.request import AnswerRecord, GenerationRequest
from api.generation.served_model import ServedModel
from api.openai.fields import response_format
from api.openai.fields.body import check_token_ids
from api.openai.responses import request as response_request
from api.openai.responses import text_format
from api.openai.responses.rendering import ResponseRendering
from api.openai.responses.stored.completion import complete
from api.openai.responses.stored.lookup import FRONT_END


async def _check(request: GenerationRequest, model: ServedModel) -> None:
    check_token_ids(request.sampling, model)
    await response_format.check(request.grammar, request.grammar_field or text_format.SCHEMA_FIELD)


def _accepted(record: AnswerRecord) -> bytes:
    """The body for a request with `background: true`."""
    return ResponseRendering(record).unfinished_body("queued")


RESPONSES = FrontEnd(
    FRONT_END, response_request.parse, _check, ResponseRendering, complete=complete, accepted=_accepted
)
