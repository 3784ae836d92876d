"""`POST /v1/completions`, OpenAI's older endpoint: text goes on."""

from __future__ import annotations

import time

import falcon.asgi

from api.generation.generation import Generations
from api.generation.model_directory import ModelDirectory
from api.http.body import parsed, read_json, report_ignored
from api.openai import request_fields
from api.openai.answer import Answer, fingerprint
from api.openai.completions import request as completion_request
from api.openai.completions.rendering import CompletionRendering
from common.settings import Settings


class Completions:
    """Goes on from a text."""

    def __init__(self, settings: Settings, directory: ModelDirectory, generations: Generations) -> None:
        self._settings = settings
        self._directory = directory
        self._generations = generations

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        body = await read_json(req, self._settings)
        request = await parsed(body, completion_request.parse)
        report_ignored(req, resp, request.ignored, strict=self._settings.strict_parameters)
        model = await self._directory.resolve(request.model)
        request_fields.check_logit_bias(request.sampling, model)
        completion_request.check_prompts(request, model)
        generation = await self._generations.begin(req, request, model, len(body))
        answer = Answer(
            id=f"cmpl-{generation.job_id}",
            created=int(time.time()),
            model=request.model or model.id,
            fingerprint=fingerprint(model.id, model.quantization),
            service_tier=request.service_tier,
        )
        rendering = CompletionRendering(
            answer,
            request.num_jobs,
            n=request.n,
            best_of=request.best_of,
            with_logprobs=request.top_logprobs is not None,
            include_usage=request.include_usage,
        )
        await generation.answer(resp, rendering, stream=request.stream)
