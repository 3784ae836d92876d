"""The wire format: the messages between API processes and workers through Redis.

`GenerationJob` is sent as the keyword arguments of an RQ job (JSON). Events are JSON arrays, in the journal and in pub/sub:
`Started`, perhaps an `Echo`, then one `Delta` per token, then exactly one terminal event, `Finished` or `Failed`.
New fields go last and have defaults, so that an old worker and a new API can share a queue during an upgrade.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy; OpenAI's range 0 to 2.
        top_p: Nucleus mass in (0, 1].
        seed: Always set (the API draws one if the client gave none), so that a takeover repeats the draws.
        repetition_penalty: Factor > 0 on the logits of recent tokens (Keskar et al. 2019, CTRL); 1 is off.
        repetition_context_size: The number of recent tokens that this factor applies to.
        logit_bias: Added to the logits, by token id.
        presence_penalty: Subtracted from the logit of each token generated before (OpenAI's range -2 to 2).
        frequency_penalty: The same, times the number of its occurrences.
        top_k: Draw from this many of the most likely tokens; 0 is off.
        min_p: Draw from tokens at least this fraction as likely as the most likely one; 0 is off.
        xtc_probability: How often all but the least likely of the tokens above `xtc_threshold` are excluded (exclude top
            choices, p-e-w 2024); 0 is off.
        xtc_threshold: 0 to 0.5.
        min_tokens: Until so many tokens were generated, neither an end-of-text token nor a stop string ends the answer.
        ignore_eos: Whether end-of-text tokens do not end the answer, which load generators ask for.
        stop_token_ids: Further tokens that end the answer as an end-of-text token does, also with `ignore_eos`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    logit_bias: dict[int, float] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []


RESERVED_TEMPLATE_ARGUMENTS = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    )
)
"""Parameters of transformers 5's `apply_chat_template`, and what it passes to templates by itself: no names in `ChatPrompt.template_arguments`."""


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Messages for the model's chat template.

    Attributes:
        messages: In order; each has a role and text content, other keys are passed to the template unchanged.
        role_mapping: Prefix by role, for a model without a chat template; None: the default mapping.
        template_arguments: Further arguments of the template, such as ``enable_thinking``.
        continue_final: Whether the answer continues the last message, the assistant's, in place of a new turn.
        opens_turn: Whether the template opens the assistant's turn after the last message (``add_generation_prompt``).
        truncate_to: A prompt of so many tokens or more loses its oldest messages; None: it is refused if it is too long.
    """

    messages: list[dict[str, Any]]
    role_mapping: dict[str, str] | None = None
    template_arguments: dict[str, Any] = {}
    continue_final: bool = False
    opens_turn: bool = True
    truncate_to: int | None = None


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    """Raw text to continue.

    Attributes:
        suffix: The text after the gap to fill, for models trained for it.
    """

    text: str
    suffix: str | None = None


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    """Token ids to continue, all in the model's vocabulary."""

    token_ids: list[int]


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """Functions that the model may call.

    Attributes:
        tools: As in OpenAI's request: ``{"type": "function", "function": {"name", "description"?, "parameters"?,
            "strict"?}}``, checked.
        is_required: Whether the answer must be a call.
        function: The only one that may be called, by name; None: any.
        is_parallel: Whether there may be several calls.
    """

    tools: list[dict[str, Any]]
    is_required: bool = False
    function: str | None = None
    is_parallel: bool = True


class GenerationJob(msgspec.Struct, frozen=True, kw_only=True):
    """One request, as parsed and checked by the API.

    Attributes:
        job_id: Ours and RQ's.
        model: Model id, which is also the RQ queue's name.
        channel: The API process's channel, on which events are published.
        max_tokens: None: up to the context. 0: nothing is generated, which is useful with `echo`.
        stop: Non-empty strings at which the text ends.
        top_logprobs: How many alternatives to report with each token; 0: only the token's own logprob; None: no logprobs.
        submitted_at: Unix seconds.
        grammar: Of the answer's text, for llguidance (`common.schema.grammar`).
        tool_use: Functions that may be called, in chats only.
        echo: Whether an `Echo` of the prompt comes first, with log-probabilities if `top_logprobs` is set.
        api_key_name: Of the client's API key, for log lines; None: the API is open, or older than this field.
        answer: How the API renders the request's answer (`api.generation.request.AnswerRecord`), in the request's first
            job only. Workers do not read it.
        max_reasoning_tokens: After so many tokens of reasoning the model's end marker is forced; None: no limit.
        journals_started: Whether the worker's first `Started` is in the journal too, as event 1.
        is_detached: Whether the job goes on without subscribers: its client may come back for the answer.
        final_ttl_seconds: The journal's time to live after its terminal event; None: the worker's setting.
        includes_stop: Whether the text ends with the stop string or the stop token that ended it, not before it.
        answer_id: The first job's id, if the request's answer is stored (`common.retention`); None: it is not.
    """

    job_id: str
    model: str
    channel: str
    prompt: ChatPrompt | TextPrompt | TokenPrompt
    max_tokens: int | None = None
    stop: list[str] = []
    top_logprobs: int | None = None
    sampling: SamplingParams = SamplingParams()
    submitted_at: float = 0.0
    grammar: str | None = None
    tool_use: ToolUse | None = None
    echo: bool = False
    api_key_name: str | None = None
    answer: dict[str, Any] | None = None
    max_reasoning_tokens: int | None = None
    journals_started: bool = False
    is_detached: bool = False
    final_ttl_seconds: int | None = None
    answer_id: str | None = None
    includes_stop: bool = False


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token with its log-probability.

    Attributes:
        token_id: In the model's vocabulary.
        logprob: Natural log, after logit processing, before temperature.
        data: The token's bytes; not always complete UTF-8 characters.
    """

    token_id: int
    logprob: float
    data: bytes


class Started(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """The prompt was accepted and is being prefilled.

    Attributes:
        n: 0: only published, not in the journal. 1 in the journal of a job that asks for it (`GenerationJob.journals_started`).
    """

    n: int
    prompt_tokens: int
    cached_tokens: int = 0


class Echo(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """The prompt, before the first token; only if the job asks for it.

    Attributes:
        n: 1.
        text: The prompt's.
        tokens: Its tokens, if log-probabilities were requested; that of the first token is 0, since nothing precedes it.
        tops: The most likely tokens at each index, best first; empty for the first.
    """

    n: int
    text: str
    tokens: list[TokenLogprob] = []
    tops: list[list[TokenLogprob]] = []


class Reasoning(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """Text of a model's reasoning before its answer."""

    text: str


class ToolCall(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """The beginning of a call.

    Attributes:
        index: From 0.
    """

    index: int
    name: str


class ToolArguments(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """A part of the arguments of a call: all parts together are one JSON object."""

    index: int
    text: str


Piece = Reasoning | ToolCall | ToolArguments


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="d", gc=False):
    """One generated token.

    Attributes:
        n: One more than that of the previous event; 1 for the first event.
        token_id: What was sampled.
        text: The text released with this token; may be empty (half a character, the possible start of a stop string) and may
            include text of earlier tokens.
        logprob: Of the sampled token, if requested; None if the token belongs to `pieces`.
        top: The most likely tokens, best first, if requested.
        pieces: Reasoning and calls that were released with this token, in order.
    """

    n: int
    token_id: int
    text: str = ""
    logprob: TokenLogprob | None = None
    top: list[TokenLogprob] = []
    pieces: list[Piece] = []


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Token counts; `completion_tokens` counts every generated token, an end-of-text token and those of reasoning too."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """Terminal: the answer is complete, or its client disconnected (``cancelled``). `n` follows the last token's.

    Attributes:
        stop_string: The one of the job's stop strings that ended the answer; None: something else did, or the worker is older than
            this field.
    """

    n: int
    finish_reason: FinishReason
    usage: Usage
    stop_string: str | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="x"):
    """Terminal: an error for the client, the fields of `errors.RequestError` (its `type` is `kind`). `n` follows the last token's."""

    n: int
    message: str
    status: int = 500
    kind: str = "server_error"
    param: str | None = None
    code: str | None = None
    retry_after_seconds: float | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A question to any worker of a model: the tokens of a prompt. Not a job: it needs no slot and no journal.

    Attributes:
        request_id: Hexadecimal, see `names.new_job_id`; the reply has it too.
        process_id: Of the API process, for its list of replies (`names.tokenized`).
        prompt: Token ids are converted to text, everything else to tokens.
        tool_use: As in `GenerationJob`, and the next one: they are part of the prompt.
        adds_special_tokens: Whether raw text gets what the tokenizer adds, such as a first token.
        returns_tokens: Whether the reply has token ids; it always has their number.
        returns_strings: Whether it has the vocabulary's string of each token.
        returns_text: Whether it has the text of the tokens.
    """

    request_id: Annotated[str, Meta(pattern=r"^[0-9a-f]{8,64}\Z")]
    process_id: Annotated[str, Meta(pattern=r"^[0-9a-f]{8,64}\Z")]
    prompt: ChatPrompt | TextPrompt | TokenPrompt
    tool_use: ToolUse | None = None
    grammar: str | None = None
    adds_special_tokens: bool = True
    returns_tokens: bool = False
    returns_strings: bool = False
    returns_text: bool = False


class TokenizeReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a `TokenizeRequest`.

    Attributes:
        count: Number of tokens.
        error: Why there is none; the other fields are empty then.
    """

    request_id: str
    count: int = 0
    token_ids: list[int] = []
    token_strings: list[str] = []
    text: str = ""
    error: Failed | None = None


decode_tokenize_request = msgspec.json.Decoder(TokenizeRequest).decode
decode_tokenize_reply = msgspec.json.Decoder(TokenizeReply).decode

Event = Started | Echo | Delta | Finished | Failed

decode_event = msgspec.json.Decoder(Event).decode
decode_step = msgspec.json.Decoder(list[tuple[str, Event]]).decode
"""A pub/sub message: (job id, event) pairs, in order within a job."""
encode = msgspec.json.Encoder().encode


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """On a model's control channel: these jobs are cancelled."""

    job_ids: list[str]


decode_control = msgspec.json.Decoder(Cancel).decode
