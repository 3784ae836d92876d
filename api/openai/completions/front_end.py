"""`POST /v1/completions`, OpenAI's legacy endpoint, as a front end: its parser, its checks and its rendering."""

from __future__ import annotations

from api.generation.front_end import FrontEnd
from api.generation.request import GenerationRequest
from api.generation.served_model import ServedModel
from api.openai.completions import request as completion_request
from api.openai.completions.rendering import CompletionRendering
from api.openai.fields import response_format
from api.openai.fields.body import check_token_ids


async def _check(request: GenerationRequest, model: ServedModel) -> None:
    check_token_ids(request.sampling, model)
    completion_request.check_prompts(request, model)
    await response_format.check(request.grammar, request.grammar_field or "response_format")


COMPLETIONS = FrontEnd("openai.completions", completion_request.parse, _check, CompletionRendering)
