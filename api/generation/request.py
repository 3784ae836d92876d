"""A request as the API understands it, whichever protocol it came by: its jobs, and the record of how it is answered.

Made by the protocols' parsers; `api.generation.endpoint` turns it into jobs. Each choice is a job of its own: it is
batched, taken over and counted like any other, by any free worker. Must not know Redis or any one protocol.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from api.generation.served_model import DEFAULT_MODEL, ServedModel
from common import names
from common.errors import invalid
from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TextPrompt, TokenPrompt, ToolUse

Prompt = ChatPrompt | TextPrompt | TokenPrompt

MAX_CHOICES = 1024
"""Of one request: prompts times choices."""

MAX_COPIES_BYTES = 64 * 2**20
"""Each choice's job has a copy of its prompt and of what all jobs share, such as stop strings; the bound on all copies of one request."""


class AnswerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that a rendering needs in addition to the events: together with the jobs' journals it determines every byte of the answer.

    Stored in the request's first job (`GenerationJob.answer`). New fields have defaults, as in `common.protocol`.

    Attributes:
        front_end: The name of the `FrontEnd` that renders it.
        job_ids: The request's jobs, in the order of the choices. The first one names the answer.
        created: Unix seconds.
        model: The model's id, also if the client named an alias.
        fingerprint: OpenAI's system_fingerprint: changes when what computes the answer does.
        stream: Whether the client asked for a stream.
        n: Choices of each prompt that are shown.
        best_of: Choices of each prompt that are generated.
        options: The front end's own.
        temperature: Of the jobs, and the next one; OpenAI's responses repeat them.
        is_stored: Whether clients can look the answer up by its id (`Retention.details`).
    """

    front_end: str
    job_ids: list[str]
    created: int
    model: str
    fingerprint: str
    stream: bool = False
    n: int = 1
    best_of: int = 1
    options: dict[str, Any] = {}
    temperature: float = 1.0
    top_p: float = 1.0
    is_stored: bool = False


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer outlives its request.

    Attributes:
        ttl_seconds: How long the answer is kept after its end.
        is_detached: Whether generation goes on without its client: the request has no deadline and is not cancelled when the
            client disconnects or the API process ends.
        details: Data of the front end, returned unchanged by the store; JSON. None: the answer can be resumed, but not looked up.
        is_optional: Whether the request is served without being stored if the store is full.
    """

    ttl_seconds: int
    is_detached: bool = False
    details: dict[str, Any] | None = None
    is_optional: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Parsed, and checked as far as possible without the model.

    Attributes:
        model: As the client named it; None: the default.
        prompts: At least one; only completions have several.
        n: Choices of each prompt.
        best_of: How many are generated to choose those from; at least `n`.
        max_tokens: None: up to the context.
        top_logprobs: As in `common.protocol.GenerationJob`.
        options: What the front end's rendering needs to know of the request (`AnswerRecord.options`).
        grammar: As in `common.protocol.GenerationJob`, as are `tool_use`, `echo` and `includes_stop`.
        grammar_field: The field of the request that asks for it, for error messages.
        ignored: Paths of unknown keys, and of parameters without an effect.
        unset: Fields of `sampling` that the client did not set: the model's own defaults apply to them.
        reasoning_fields: Those that ask for reasoning or limit it; they have no effect on a model without markers of reasoning.
        max_reasoning_tokens: As in `common.protocol.GenerationJob`, and the next one.
        journals_started: Set by a front end whose rendering needs the prompt's token count at the beginning.
        retention: How the answer outlives the request; None: it does not.
        is_background: Whether the response is sent as soon as the jobs are queued (`FrontEnd.accepted`); needs a detached
            `retention`. A stream is not affected.
        is_truncated: Whether a chat that is too long for the model loses its oldest messages.
        extra_bytes: The size of what is not in the request's body, such as a stored conversation that it continues.
    """

    model: str | None
    prompts: list[Prompt]
    max_tokens: int | None
    stop: list[str]
    top_logprobs: int | None
    sampling: SamplingParams
    stream: bool
    ignored: list[str]
    options: msgspec.Struct | None = None
    n: int = 1
    best_of: int = 1
    grammar: str | None = None
    grammar_field: str | None = None
    tool_use: ToolUse | None = None
    echo: bool = False
    includes_stop: bool = False
    unset: frozenset[str] = frozenset()
    reasoning_fields: list[str] = []
    max_reasoning_tokens: int | None = None
    journals_started: bool = False
    retention: Retention | None = None
    is_background: bool = False
    extra_bytes: int = 0
    is_truncated: bool = False

    @property
    def num_jobs(self) -> int:
        """One for each generated choice."""
        return len(self.prompts) * self.best_of

    def without_effect(self, model: ServedModel) -> list[str]:
        """Fields that have no effect with this model."""
        return [] if model.can_reason else self.reasoning_fields

    def jobs(
        self,
        front_end: str,
        model: ServedModel,
        channel: str,
        estimated_tokens: list[int],
        api_key_name: str | None = None,
    ) -> list[GenerationJob]:
        """The choices of the first prompt, then those of the next. The first job has the request's `AnswerRecord`.

        Args:
            front_end: The name of the one that renders the answer.
            channel: Where the jobs' events are published, unless the request is detached, which has a channel of its own.
            estimated_tokens: Of a job of each prompt.
            api_key_name: Of the client's key; None: the API is open.
        """
        top_logprobs = self.top_logprobs
        if self.best_of > self.n and top_logprobs is None:
            top_logprobs = 0  # the best choice is found by them
        sampling = _with_defaults(self.sampling, self.unset, model.sampling_defaults)
        submitted_at = time.time()
        prompts = [
            (prompt, names.new_job_id(num_tokens), choice)
            for prompt, num_tokens in zip(_truncatable(self, model), estimated_tokens, strict=True)
            for choice in range(self.best_of)
        ]
        retention, answer_id = self.retention, prompts[0][1]
        if retention is not None and retention.is_detached:
            channel = names.stream_channel(answer_id)
        job_ids = [job_id for _, job_id, _ in prompts]
        record = self._record(front_end, model, job_ids, sampling, int(submitted_at))
        return [
            GenerationJob(
                job_id=job_id,
                model=model.id,
                channel=channel,
                prompt=prompt,
                max_tokens=self.max_tokens,
                stop=self.stop,
                top_logprobs=top_logprobs,
                sampling=_sampling_of_choice(sampling, choice),
                submitted_at=submitted_at,
                grammar=self.grammar,
                tool_use=self.tool_use,
                echo=self.echo,
                includes_stop=self.includes_stop,
                api_key_name=api_key_name,
                answer=msgspec.to_builtins(record) if index == 0 else None,
                max_reasoning_tokens=self.max_reasoning_tokens,
                journals_started=self.journals_started,
                is_detached=retention is not None and retention.is_detached,
                final_ttl_seconds=None if retention is None else retention.ttl_seconds,
                answer_id=None if retention is None else answer_id,
            )
            for index, (prompt, job_id, choice) in enumerate(prompts)
        ]

    def _record(
        self, front_end: str, model: ServedModel, job_ids: list[str], sampling: SamplingParams, created: int
    ) -> AnswerRecord:
        """The request's record.

        Args:
            sampling: With the model's defaults.
        """
        return AnswerRecord(
            front_end=front_end,
            job_ids=job_ids,
            created=created,
            model=DEFAULT_MODEL if self.model == DEFAULT_MODEL else model.id,
            fingerprint=fingerprint(model),
            stream=self.stream,
            n=self.n,
            best_of=self.best_of,
            options={} if self.options is None else msgspec.to_builtins(self.options),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            is_stored=self.retention is not None and self.retention.details is not None,
        )


def unset_sampling(given: Iterable[str]) -> frozenset[str]:
    """The fields of `SamplingParams` that a client left unset, for `GenerationRequest.unset`.

    Args:
        given: Those that it set.
    """
    return frozenset(SamplingParams.__struct_fields__).difference(given, ("seed",))


def _truncatable(request: GenerationRequest, model: ServedModel) -> list[Prompt]:
    """The request's prompts; chats say from which length on messages are dropped, if they are."""
    if not request.is_truncated:
        return request.prompts
    return [
        msgspec.structs.replace(prompt, truncate_to=model.context_length)
        if isinstance(prompt, ChatPrompt)
        else prompt
        for prompt in request.prompts
    ]


def answer_record(first: GenerationJob) -> AnswerRecord:
    """The record of a request, from its first job.

    Raises:
        msgspec.ValidationError: The job has none: it is not the first of its request, or of an older API.
    """
    return msgspec.convert(first.answer, AnswerRecord)


def check_size(request: GenerationRequest, num_bytes: int) -> None:
    """Bound the number and the total size of a request's jobs.

    Args:
        num_bytes: The size of the request's body.

    Raises:
        RequestError: 400.
    """
    param = "prompt" if len(request.prompts) > request.best_of else "n"
    if request.num_jobs > MAX_CHOICES:
        raise invalid(
            f"The request asks for {request.num_jobs} choices; at most {MAX_CHOICES} are allowed.", param
        )
    if request.num_jobs == 1:
        return
    shared_bytes = _shared_bytes(request)
    # The rest of the body is the prompts, each of which is in the jobs of its own choices only.
    copies_bytes = request.num_jobs * shared_bytes + request.best_of * max(0, num_bytes - shared_bytes)
    if copies_bytes > MAX_COPIES_BYTES:
        raise invalid(
            "The request is too large: its prompt, stop strings and other fields are stored once for each choice, "
            f"{copies_bytes} bytes in all, and at most {MAX_COPIES_BYTES} are allowed.",
            param,
        )


def _shared_bytes(request: GenerationRequest) -> int:
    """The size of what is copied into every job of the request, in JSON."""
    first = request.prompts[0]
    suffix = first.suffix if isinstance(first, TextPrompt) else None  # the same for all prompts
    shared = (request.stop, request.sampling, request.grammar, request.tool_use, suffix)
    return len(msgspec.json.encode(shared))


def _version() -> str:
    """mlx-pool's; 0 if it is not installed."""
    try:
        return importlib.metadata.version("mlx-pool")
    except importlib.metadata.PackageNotFoundError:
        return "0"


VERSION = _version()


def fingerprint(model: ServedModel) -> str:
    """The same for the same model under the same version of mlx-pool."""
    return "fp_" + hashlib.sha256(f"{model.id}\0{model.quantization}\0{VERSION}".encode()).hexdigest()[:10]


def _with_defaults(
    sampling: SamplingParams, unset: frozenset[str], defaults: Mapping[str, int | float]
) -> SamplingParams:
    """The request's parameters, with the model's own defaults for those that the client did not set."""
    changes = {name: value for name, value in defaults.items() if name in unset}
    return msgspec.structs.replace(sampling, **changes) if changes else sampling


def _sampling_of_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The first choice is what a request for a single one would get; the others draw with seeds of their own."""
    if choice == 0:
        return sampling
    digest = hashlib.blake2b(f"{sampling.seed} {choice}".encode(), digest_size=8).digest()
    return msgspec.structs.replace(sampling, seed=int.from_bytes(digest) >> 1)
