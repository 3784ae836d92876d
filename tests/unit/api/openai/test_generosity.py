"""What clients of local servers send beyond OpenAI's description, and what is made of it. docs/parameters.md has the decisions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.generation.request import GenerationRequest
from api.openai.answer import AnswerOptions
from api.openai.chat import request as chat_request
from api.openai.completions import request as completion_request
from common.errors import RequestError
from common.protocol import ChatPrompt, SamplingParams

HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
F = {"type": "function", "function": FUNCTION}


def parse(**fields: Any) -> GenerationRequest:
    return chat_request.parse(json.dumps({"messages": HI} | fields).encode())


def complete(**fields: Any) -> GenerationRequest:
    return completion_request.parse(json.dumps({"prompt": "hi"} | fields).encode())


def prompt(**fields: Any) -> ChatPrompt:
    (only,) = parse(**fields).prompts
    assert isinstance(only, ChatPrompt)
    return only


def refused_param(**fields: Any) -> str | None:
    with pytest.raises(RequestError) as raised:
        parse(**fields)
    assert raised.value.status == 400
    return raised.value.param


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function"])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}, {"content": ""}])
def test_a_message_without_content_has_an_empty_text(role: str, content: dict[str, Any]) -> None:
    """In every role: a tool that returned nothing, an assistant's turn that was stopped at once."""
    (message,) = prompt(messages=[{"role": role} | content]).messages
    assert message["content"] == ""


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (["a", "b"], "ab"),
        ([{"text": "a"}, {"type": None, "text": "b"}], "ab"),
        (
            [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}],
            "ab",
        ),
        ([{"type": "text", "text": None}, {"type": "text"}], ""),
        ([{"type": "refusal", "refusal": "no"}], "no"),
    ],
)
@pytest.mark.parametrize("role", ["user", "tool", "assistant"])
def test_parts_that_are_texts(role: str, content: Any, text: str) -> None:
    """Strings in a list, parts of the Responses API, parts without a type."""
    assert prompt(messages=[{"role": role, "content": content}]).messages[0]["content"] == text


@pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "file", "document", "video_url"])
def test_other_parts_are_refused_by_name(kind: str) -> None:
    """A model that has not seen the picture would make up what it shows."""
    with pytest.raises(RequestError) as raised:
        parse(messages=[{"role": "user", "content": ["what is it?", {"type": kind, kind: {}}]}])
    assert (raised.value.param, raised.value.code) == ("messages[0].content[1].type", "unsupported_content")


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"thinking": "hm"},
        {
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "a"},
            ]
        },
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "a"]},
        {"content": [{"type": "reasoning", "text": "hm"}, "a"]},
    ],
)
def test_thoughts_in_the_history(fields: dict[str, Any]) -> None:
    """Under each of their names; templates know one."""
    message = {"role": "assistant", "content": "a"} | fields
    assert prompt(messages=[message]).messages == [
        {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    ]


def test_an_assistant_turn_with_nothing_but_thoughts() -> None:
    """Sent back by the Vercel AI SDK after an answer that was cut while the model was thinking."""
    (message,) = prompt(messages=[{"role": "assistant", "content": None, "reasoning_content": "hm"}]).messages
    assert message == {"role": "assistant", "content": "", "reasoning_content": "hm"}


def test_calls_without_ids_and_types() -> None:
    """Ids are made up, and differ from those that the client has; arguments may be an object, or missing."""
    calls = [
        {"function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "call_1", "type": "", "function": {"name": "g"}, "index": 0},
        {"id": None, "type": "function", "function": {"name": "h", "arguments": None}},
        {"id": "x", "type": "custom", "custom": {"name": "shell", "input": "ls"}},
    ]
    (message,) = prompt(messages=[{"role": "assistant", "tool_calls": calls}]).messages
    assert message["tool_calls"] == [
        {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": {}}},
        {"id": "call_2", "type": "function", "function": {"name": "h", "arguments": {}}},
        {"id": "x", "type": "function", "function": {"name": "shell", "arguments": {"input": "ls"}}},
    ]


def test_results_without_ids_belong_to_the_open_calls_in_order() -> None:
    """Ollama's clients send none; a result with a name belongs to the first open call of that function."""
    calls = [{"id": str(i), "function": {"name": name}} for i, name in enumerate("fgfh")]
    results = [
        {"role": "tool", "content": "f0"},
        {"role": "tool", "name": "h", "content": "h3"},
        {"role": "tool", "tool_call_id": "1", "content": "g1"},
        {"role": "tool", "tool_call_id": "", "content": "f2"},
        {"role": "tool", "content": "no call is left"},
    ]
    messages = prompt(messages=[{"role": "assistant", "tool_calls": calls}, *results]).messages[1:]
    assert [(m["tool_call_id"], m.get("name")) for m in messages] == [
        ("0", "f"),
        ("3", "h"),
        ("1", "g"),
        ("2", "f"),
        ("call_4", None),
    ]


def test_fields_of_other_servers_in_messages_are_reported() -> None:
    """Ignored and named; those of OpenAI's own answers are known."""
    answer = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert parse(messages=[answer]).ignored == []
    assert parse(messages=[*HI, answer | {"id": "m1", "provider_options": {"x": 1}}]).ignored == [
        "messages[1].id",
        "messages[1].provider_options",
    ]


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ({"type": "auto"}, (False, None)),
        ({"type": "required"}, (True, None)),
        ({"type": "any"}, (True, None)),
        ("any", (True, None)),
        ({"type": "function", "name": "f"}, (True, "f")),
        ({"type": "tool", "name": "f"}, (True, "f")),
        ({"name": "f"}, (True, "f")),
        ({"function": {"name": "f"}}, (True, "f")),
        ({}, (False, None)),
    ],
)
def test_tool_choices_of_other_apis(given: Any, choice: tuple[bool, str | None]) -> None:
    """Strings as objects (Cursor), Anthropic's and Mistral's names, a name outside of the function."""
    tool_use = parse(tools=[F], tool_choice=given).tool_use
    assert tool_use is not None
    assert (tool_use.is_required, tool_use.function) == choice


def test_no_tools_and_fields_that_depend_on_them() -> None:
    """Frameworks set those always."""
    for tools in ({}, {"tools": None}, {"tools": []}):
        for choice in (
            {},
            {"tool_choice": "auto"},
            {"tool_choice": "none"},
            {"tool_choice": {"type": "none"}},
        ):
            request = parse(**tools, **choice, parallel_tool_calls=True)
            assert (request.tool_use, request.ignored) == (None, [])
    assert refused_param(tools=[], tool_choice="required") == "tool_choice"
    assert parse(tools=[F], tool_choice={"type": "none"}).tool_use is None


@pytest.mark.parametrize(
    "tool",
    [
        F,
        {"function": FUNCTION},
        {"type": "function"} | FUNCTION,
        {"name": "f", "input_schema": FUNCTION["parameters"]},
        {"type": "function", "function": {"name": "f", "input_schema": FUNCTION["parameters"]}},
        {"type": "function", "function": FUNCTION | {"strict": None, "description": None}},
    ],
)
def test_functions_in_the_forms_of_other_apis(tool: dict[str, Any]) -> None:
    """OpenAI's two, and Anthropic's, which Cursor sends."""
    request = parse(tools=[tool])
    assert request.tool_use is not None
    assert (request.tool_use.tools, request.ignored) == ([F], [])


@pytest.mark.parametrize(
    ("parameters", "cleaned"),
    [
        (None, NO_PARAMETERS),
        ({}, NO_PARAMETERS),
        ({"type": None, "properties": None, "required": None}, NO_PARAMETERS),
        ({"type": "object", "properties": None}, {"type": "object"}),
        ({"type": "object", "properties": []}, {"type": "object", "properties": {}}),
        (
            {
                "type": "object",
                "properties": {
                    "required": {"type": "array", "items": {"type": "string", "enum": None}, "default": None},
                    "o": {"anyOf": [{"type": "object", "properties": None}, {"const": None}]},
                },
            },
            {
                "type": "object",
                "properties": {
                    "required": {"type": "array", "items": {"type": "string"}, "default": None},
                    "o": {"anyOf": [{"type": "object"}, {"const": None}]},
                },
            },
        ),
    ],
)
def test_nulls_in_a_schema_mean_that_the_keyword_is_absent(parameters: Any, cleaned: Any) -> None:
    """Except where null is a value."""
    tool_use = parse(
        tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    ).tool_use
    assert tool_use is not None
    assert tool_use.tools[0]["function"]["parameters"] == cleaned


@pytest.mark.parametrize("name", ["server.tool", "a:b", "a/b", "x" * 128, "a@1"])
def test_names_of_mcp_tools(name: str) -> None:
    """MCP clients put the server's name in front."""
    tool_use = parse(tools=[{"type": "function", "function": {"name": name}}]).tool_use
    assert tool_use is not None
    assert tool_use.tools[0]["function"]["name"] == name


def test_a_function_that_is_given_twice_counts_once() -> None:
    """Two clients of one framework may register the same tool."""
    tool_use = parse(tools=[F, F]).tool_use
    assert tool_use is not None
    assert tool_use.tools == [F]


def test_many_tools() -> None:
    """Several MCP servers together have more than OpenAI's 128."""
    tool_use = parse(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(512)]).tool_use
    assert tool_use is not None
    assert len(tool_use.tools) == 512


def test_other_tools_beside_functions_are_left_out_and_reported() -> None:
    """The functions can still be called; a request with only such tools is refused."""
    request = parse(tools=[{"type": "web_search"}, F, {"type": "file_search", "n": 1}])
    assert request.tool_use is not None
    assert request.tool_use.tools == [F]
    assert request.ignored == ["tools[2].n", "tools[0]", "tools[2]"]
    assert refused_param(tools=[{"type": "web_search"}]) == "tools[0].type"


@pytest.mark.parametrize(
    ("fields", "max_tokens", "ignored"),
    [
        ({"max_tokens": -1}, None, []),
        ({"max_completion_tokens": -1}, None, []),
        ({"n_predict": -1}, None, []),
        ({"n_predict": 7}, 7, []),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6, ["max_tokens"]),
        ({"max_tokens": 5, "max_completion_tokens": -1}, None, ["max_tokens"]),
        ({"max_tokens": 5, "n_predict": 5}, 5, []),
        ({"max_tokens": 5.0}, 5, []),
    ],
)
def test_limits_on_the_length(fields: dict[str, Any], max_tokens: int | None, ignored: list[str]) -> None:
    """-1 is no limit; of two limits the newer field's holds, and the other is named."""
    request = parse(**fields)
    assert (request.max_tokens, request.ignored) == (max_tokens, ignored)


def test_limits_on_the_length_of_a_legacy_completion() -> None:
    """The same, with OpenAI's default."""
    given: list[dict[str, Any]] = [
        {},
        {"max_tokens": -1},
        {"n_predict": 3},
        {"max_tokens": 0, "n_predict": 3},
    ]
    requests = [complete(**fields) for fields in given]
    assert [request.max_tokens for request in requests] == [16, None, 3, 0]
    assert requests[3].ignored == ["n_predict"]


@pytest.mark.parametrize("parser", [parse, complete])
def test_sampling_under_the_names_of_other_servers(parser: Any) -> None:
    """vLLM's, llama.cpp's and LM Studio's."""
    sampling = parser(
        repeat_penalty=1.1,
        repeat_last_n=64,
        min_tokens=3,
        ignore_eos=True,
        top_k=-1,
        min_p=0.1,
        stop_token_ids=[5, 3, 5],
    ).sampling
    assert sampling == SamplingParams(
        seed=sampling.seed,
        repetition_penalty=1.1,
        repetition_context_size=64,
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=[5, 3],
        min_p=0.1,
    )
    assert parser(repeat_penalty=1.1, repeat_last_n=0).sampling.repetition_penalty == 1
    assert parser(repeat_last_n=-1).sampling.repetition_context_size == 2**31 - 1
    request = parser(repetition_penalty=1.2, repeat_penalty=1.1)
    assert (request.sampling.repetition_penalty, request.ignored) == (1.2, ["repeat_penalty"])


def test_a_seed_of_minus_one_is_random() -> None:
    """As in vLLM, llama.cpp and LM Studio."""
    seeds = {parse(seed=-1).sampling.seed for _ in range(4)}
    assert len(seeds) == 4
    assert min(seeds) >= 0


def test_parameters_that_are_left_unset() -> None:
    """The model's own defaults apply to those, and only to those."""
    fields = frozenset(SamplingParams.__struct_fields__) - {"seed"}
    assert parse().unset == complete(temperature=None).unset == fields
    assert parse(temperature=0.5, top_k=0).unset == fields - {"temperature", "top_k"}
    assert parse(top_p=0).unset == fields - {"temperature", "top_p"}
    assert parse(repeat_penalty=1).unset == fields - {"repetition_penalty"}


def test_stop_strings() -> None:
    """More than OpenAI's four, and empty ones, which stop nothing."""
    assert parse(stop=[str(i) for i in range(64)]).stop == [str(i) for i in range(64)]
    assert parse(stop=["", "a"]).stop == ["a"]
    assert parse(stop="").stop == []


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"store": True}, ["store"]),
        ({"store": False}, []),
        ({"verbosity": "low"}, ["verbosity"]),
        ({"prediction": {"type": "content", "content": "x"}}, ["prediction"]),
        ({"audio": {"voice": "alloy"}}, ["audio"]),
        ({"service_tier": "priority"}, ["service_tier"]),
        ({"service_tier": "default"}, []),
        ({"stream_options": {"include_usage": True}}, ["stream_options"]),
        ({"stream": False, "stream_options": {"include_usage": False}}, []),
        ({"options": {"num_ctx": 4096}, "keep_alive": "5m"}, ["options", "keep_alive"]),
        ({"mirostat": 2, "typical_p": 0.9, "dry_multiplier": 1}, ["mirostat", "typical_p", "dry_multiplier"]),
        ({"use_beam_search": False, "skip_special_tokens": True}, ["use_beam_search", "skip_special_tokens"]),
        ({"cache_prompt": True, "id_slot": -1, "ttl": 60}, ["cache_prompt", "id_slot", "ttl"]),
    ],
)
def test_what_has_no_effect_is_reported(fields: dict[str, Any], ignored: list[str]) -> None:
    """Ignored and named, unless the value asks for nothing."""
    assert parse(**fields).ignored == ignored


def test_usage_in_each_chunk() -> None:
    """vLLM's option for load generators; the worker is asked to report the prompt's length at the beginning."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    for request in (
        parse(stream=True, stream_options=options),
        complete(stream=True, stream_options=options),
    ):
        assert request.options == AnswerOptions(include_usage=True, continuous_usage=True)
        assert request.journals_started
        assert request.ignored == []
    assert not parse(stream=True, stream_options={"include_usage": True}).journals_started
    assert not parse(stream_options=options).journals_started


def test_log_probabilities_as_numbers() -> None:
    """0 and 1 are false and true, as in servers that coerce them."""
    assert parse(logprobs=0).top_logprobs is None
    assert parse(logprobs=0, top_logprobs=0).top_logprobs is None
    assert parse(logprobs=1, top_logprobs=2).top_logprobs == 2
    assert complete(logprobs=20).top_logprobs == 20
    assert refused_param(logprobs=0, top_logprobs=1) == "top_logprobs"


ASSISTANT = {"role": "assistant", "content": "The capital is"}


@pytest.mark.parametrize(
    ("messages", "fields", "continues"),
    [
        ([*HI, ASSISTANT], {}, False),
        ([*HI, ASSISTANT], {"add_generation_prompt": True}, False),
        ([*HI, ASSISTANT], {"continue_final_message": True}, True),
        ([*HI, ASSISTANT], {"continue_final_message": True, "add_generation_prompt": False}, True),
        ([*HI, ASSISTANT], {"add_generation_prompt": False}, True),
        ([*HI, ASSISTANT | {"prefix": True}], {}, True),
        ([*HI, ASSISTANT | {"partial": True}], {}, True),
        ([ASSISTANT | {"prefix": True}, *HI], {}, False),
        (HI, {"continue_final_message": False, "add_generation_prompt": True}, False),
    ],
)
def test_a_last_message_is_continued_on_request(
    messages: list[Any], fields: dict[str, Any], continues: bool
) -> None:
    """vLLM's fields of the request, and DeepSeek's and Moonshot's marks of the message."""
    request = prompt(messages=messages, **fields)
    assert request.continue_final == continues


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        (HI, {"continue_final_message": True}, "continue_final_message"),
        (HI, {"add_generation_prompt": False}, "add_generation_prompt"),
        ([*HI, {"role": "assistant", "tool_calls": [CALL]}], {"continue_final_message": True}, None),
        (
            [*HI, ASSISTANT],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: list[Any], fields: dict[str, Any], param: Any) -> None:
    """Only an assistant's text can be."""
    assert refused_param(messages=messages, **fields) == (param or next(iter(fields)))


@pytest.mark.parametrize(
    ("fields", "arguments", "max_tokens"),
    [
        ({"enable_thinking": False}, {"enable_thinking": False}, None),
        ({"thinking": True}, {"enable_thinking": True}, None),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}, None),
        ({"thinking": {"type": "adaptive"}}, {}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, {"enable_thinking": True}, 100),
        ({"thinking": {"type": "disabled", "budget_tokens": 100}}, {"enable_thinking": False}, None),
        ({"reasoning": {"effort": "minimal"}}, {"reasoning_effort": "minimal"}, None),
        ({"reasoning": {"max_tokens": 50, "enabled": True}}, {"enable_thinking": True}, 50),
        ({"reasoning": {"effort": "none"}}, {"reasoning_effort": "none", "enable_thinking": False}, None),
        ({"think": False}, {"enable_thinking": False}, None),
        ({"think": "high"}, {"reasoning_effort": "high"}, None),
        ({"thinking_budget": 30}, {"thinking_budget": 30}, 30),
        ({"thinking_token_budget": 30}, {}, 30),
        ({"reasoning_budget": -1}, {}, None),
        ({"reasoning_budget": 0}, {"enable_thinking": False}, None),
        ({"chat_template_kwargs": {"thinking_budget": 9}}, {"thinking_budget": 9}, 9),
        ({"reasoning_effort": "xhigh"}, {"reasoning_effort": "xhigh"}, None),
        ({"reasoning_effort": "low", "reasoning": {"effort": "low"}}, {"reasoning_effort": "low"}, None),
    ],
)
def test_reasoning_under_its_many_names(
    fields: dict[str, Any], arguments: dict[str, Any], max_tokens: int | None
) -> None:
    """A switch, an effort and a budget."""
    request = parse(**fields)
    (only,) = request.prompts
    assert isinstance(only, ChatPrompt)
    assert only.template_arguments == arguments
    assert request.max_reasoning_tokens == max_tokens
    assert request.ignored == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"enable_thinking": True, "thinking": False}, "enable_thinking"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"thinking_budget": 1, "reasoning": {"max_tokens": 2}}, "thinking_budget"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "reasoning_effort"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"thinking_budget": -2}, "thinking_budget"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ],
)
def test_contradicting_fields_of_reasoning_are_refused(fields: dict[str, Any], param: str) -> None:
    """Neither of the two could be honored."""
    assert refused_param(**fields) == param


@pytest.mark.parametrize("fields", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_reasoning_that_the_answer_leaves_out(fields: dict[str, Any]) -> None:
    """vLLM's and OpenRouter's fields."""
    assert parse(**fields).options == AnswerOptions(hides_reasoning=True)


def test_template_arguments_are_data() -> None:
    """Any name that a template may have, with any value; those of transformers itself are refused elsewhere."""
    arguments = {"builtin_tools": ["python"], "custom": {"a": [1, None]}, "date_string": "1 Jan"}
    assert prompt(chat_template_kwargs=arguments).template_arguments == arguments
