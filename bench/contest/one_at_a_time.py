"""The baseline without batching: an RQ job function that answers one prompt with mlx-lm, for a stock `rq worker`.

Run by `rq worker --worker-class rq.SimpleWorker`, one job after another; the model is loaded by the first job. It is the
simplest way to combine RQ and mlx-lm.
"""

from __future__ import annotations

import functools

from common.settings import Settings
from worker.mlx import model as mlx_model
from worker.models import model_folder


@functools.cache
def _model() -> mlx_model.LoadedModel:
    settings = Settings.load()
    return mlx_model.load_model(settings, model_folder.find(settings))


def generate(prompt: str, max_tokens: int) -> int:
    """Generate greedily; returns the number of tokens."""
    loaded = _model()
    from mlx_lm import stream_generate

    token_ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True
    )
    num_tokens = 0
    for response in stream_generate(loaded.model, loaded.tokenizer, token_ids, max_tokens=max_tokens):
        num_tokens = response.generation_tokens
    return num_tokens
