"""Records of answers for tests of renderings, and a model for tests of requests."""

from __future__ import annotations

from typing import Any

from api.generation.request import AnswerRecord
from api.generation.served_model import ServedModel
from api.openai.answer import AnswerOptions

MODEL = ServedModel("m", 0, 1000, 100, 1, 1, "4-bit")


def record(
    num_choices: int = 1,
    *,
    front_end: str = "openai.chat",
    job_id: str = "1",
    n: int = 1,
    best_of: int | None = None,
    stream: bool = False,
    **options: Any,
) -> AnswerRecord:
    """The record of an answer of so many choices, all of one prompt unless `best_of` says otherwise."""
    AnswerOptions(**options)  # fails for one that does not exist
    return AnswerRecord(
        front_end=front_end,
        job_ids=[job_id, *(f"{job_id}.{i}" for i in range(1, num_choices))],
        created=5,
        model="m/1",
        fingerprint="fp_1",
        stream=stream,
        n=n,
        best_of=num_choices if best_of is None else best_of,
        options=options,
    )
