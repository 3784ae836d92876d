"""Bodies of `/v1/messages`: what is served, what is ignored and named, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from api.anthropic.messages.request import parse
from api.generation.request import GenerationRequest
from api.openapi import document as openapi
from common.errors import RequestError
from common.protocol import ChatPrompt
from common.schema import grammar
from common.settings import Settings

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def request(**fields: Any) -> GenerationRequest:
    return parse(json.dumps({"max_tokens": 9, "messages": HI} | fields).encode())


def prompt(**fields: Any) -> ChatPrompt:
    [found] = request(**fields).prompts
    assert isinstance(found, ChatPrompt)
    return found


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        request(**fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    return caught.value


def test_the_plainest_request() -> None:
    """One user message; nothing is ignored, thinking is off, and all sampling is the model's own."""
    found = request(model="m")
    assert found.model == "m"
    assert found.prompts == [
        ChatPrompt([{"role": "user", "content": "hi"}], template_arguments={"enable_thinking": False})
    ]
    assert (found.max_tokens, found.stop, found.stream, found.ignored) == (9, [], False, [])
    assert found.tool_use is None
    assert found.grammar is None
    assert found.max_reasoning_tokens is None
    assert found.journals_started
    assert {"temperature", "top_p", "top_k"} <= found.unset


def test_sampling() -> None:
    """What the client sets holds; `top_p: 0` is greedy; -1 turns `top_k` off."""
    found = request(temperature=0.5, top_k=3, top_p=0.9, seed=7, presence_penalty=1)
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.top_p) == (0.5, 3, 0.9)
    assert (found.sampling.seed, found.sampling.presence_penalty) == (7, 1)
    assert not {"temperature", "top_p", "top_k", "presence_penalty"} & found.unset
    assert request(top_p=0).sampling.temperature == 0
    assert request(top_k=-1).sampling.top_k == 0


def test_max_tokens() -> None:
    """More than any context is accepted, since the worker cuts it; 0 generates nothing; absent, the context is the limit."""
    assert request(max_tokens=2**31 - 1).max_tokens == 2**31 - 1
    assert request(max_tokens=0).max_tokens == 0
    assert request(max_tokens=None).max_tokens is None
    assert refusal(max_tokens=-1).param == "max_tokens"


def test_system_text_and_blocks() -> None:
    """Both become the first message; `cache_control` does not change it; a block for Anthropic's billing is left out and named."""
    assert prompt(system="S").messages[0] == {"role": "system", "content": "S"}
    blocks = [{"type": "text", "text": text} for text in ("a", "b")]
    marked = [block | {"cache_control": {"type": "ephemeral"}} for block in blocks]
    billing = {"type": "text", "text": "x-anthropic-billing-header: cch=1;"}
    assert prompt(system=blocks) == prompt(system=marked) == prompt(system=[billing, *marked])
    assert prompt(system=blocks).messages[0]["content"] == "a\n\nb"
    assert request(system=[billing, *blocks]).ignored == ["system[0]"]
    assert prompt(system="").messages[0]["role"] == "user"


def test_a_turn_of_an_agent() -> None:
    """Thoughts, text and a call in one message; each result is a message, in order with the texts around it; errors are marked."""
    found = prompt(
        messages=[
            *HI,
            {"role": "system", "content": "in the middle"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "any"},
                    {"type": "text", "text": "Loo"},
                    {"type": "text", "text": "k", "citations": None},
                    {"type": "tool_use", "id": "t1", "name": "ls", "input": {"path": "/"}},
                    {"type": "tool_use", "id": "t2", "name": "cat", "input": '{"path": "x"}'},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "before"},
                    {"type": "tool_result", "tool_use_id": "t1", "content": "a b"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no such file"}],
                    },
                    {"type": "text", "text": "and"},
                    {"type": "text", "text": "now?", "cache_control": {"type": "ephemeral"}},
                ],
            },
        ]
    )
    call = {"id": "t1", "type": "function", "function": {"name": "ls", "arguments": {"path": "/"}}}
    second = {"id": "t2", "type": "function", "function": {"name": "cat", "arguments": {"path": "x"}}}
    assert found.messages == [
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "in the middle"},
        {"role": "assistant", "content": "Look", "reasoning_content": "hm", "tool_calls": [call, second]},
        {"role": "user", "content": "before"},
        {"role": "tool", "content": "a b", "tool_call_id": "t1", "name": "ls"},
        {"role": "tool", "content": "Error: no such file", "tool_call_id": "t2", "name": "cat"},
        {"role": "user", "content": "and\nnow?"},
    ]
    assert not found.continue_final


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("kind", ["user", "assistant", "result"])
def test_empty_contents(content: Any, kind: str) -> None:
    """They are empty texts: a history that has one is sent again with every turn."""
    if kind == "result":
        block = {"type": "tool_result", "tool_use_id": "t", "content": content}
        messages: list[Any] = [{"role": "user", "content": [block]}]
    else:
        messages = [{"role": kind, "content": content}, *HI]
    first = prompt(messages=messages).messages[0]
    assert first["content"] == ""
    assert first["role"] == ("tool" if kind == "result" else kind)


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (
            {"type": "document", "source": {"type": "text", "data": "D"}, "title": "T", "context": "C"},
            "T\nC\nD",
        ),
        ({"type": "document", "source": {"type": "content", "content": "D"}}, "D"),
        (
            {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "D"}]}},
            "D",
        ),
        (
            {
                "type": "search_result",
                "source": "s",
                "title": "T",
                "content": [{"type": "text", "text": "X"}],
            },
            "T\ns\nX",
        ),
    ],
)
def test_documents_that_are_text(block: Any, text: str) -> None:
    """Their text, title and context are in the prompt, in messages and in results."""
    assert prompt(messages=[{"role": "user", "content": [block]}]).messages[0]["content"] == text
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
    assert prompt(messages=[{"role": "user", "content": [result]}]).messages[0]["content"] == text


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x"}}
FILE = {"type": "document", "source": {"type": "file", "file_id": "f"}}


@pytest.mark.parametrize(
    ("block", "where"),
    [(IMAGE, "type"), (PDF, "source.type"), (FILE, "source.type"), ({"type": "video"}, "type")],
)
def test_other_media(block: Any, where: str) -> None:
    """A 400 that names the block. In a tool's result a note replaces it, since the result is sent again with every turn."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, block]}]
    assert refusal(messages=messages).param == f"messages[0].content[1].{where}"
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "a"}, block]}
    found = request(messages=[{"role": "user", "content": [result]}])
    [said] = found.prompts
    assert isinstance(said, ChatPrompt)
    assert said.messages[0]["content"] == f"a\n[{block['type']} left out: this model reads only text]"
    assert found.ignored == ["messages[0].content[0].content[1]"]


def test_blocks_that_are_skipped() -> None:
    """What Anthropic's servers made and what cannot be read is named; the rest of the message is served."""
    others = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "web_search_result"}]},
        {"type": "made_up"},
    ]
    messages = [*HI, {"role": "assistant", "content": [*others, {"type": "text", "text": "So."}]}, *HI]
    found = request(messages=messages)
    assert found.ignored == [f"messages[1].content[{i}]" for i in range(4)]
    only = request(messages=[*HI, {"role": "assistant", "content": others}, *HI]).prompts[0]
    assert isinstance(only, ChatPrompt)
    assert [message["role"] for message in only.messages] == ["user", "user"]


def test_the_report_of_skipped_blocks_is_bounded() -> None:
    """A body may have a great many, and they are named in a header."""
    blocks = [{"type": "made_up"}] * 1000
    assert len(request(messages=[{"role": "user", "content": blocks}]).ignored) <= 32


@pytest.mark.parametrize(
    ("content", "continued"),
    [
        ("The answer is (", "The answer is ("),
        ("The answer is: \n", "The answer is:"),
        ([{"type": "text", "text": "A"}, {"type": "text", "text": "B "}], "AB"),
    ],
)
def test_a_last_assistant_message_is_continued(content: Any, continued: str) -> None:
    """Without white space at its end, which the answer's first token has."""
    found = prompt(messages=[*HI, {"role": "assistant", "content": content}])
    assert found.continue_final
    assert found.messages[-1] == {"role": "assistant", "content": continued}


def test_nothing_to_continue() -> None:
    """An empty last message is as if it were absent; one with a call is followed by a new turn."""
    for content in ("", " \n", []):
        found = prompt(messages=[*HI, {"role": "assistant", "content": content}])
        assert not found.continue_final
        assert found.messages == [{"role": "user", "content": "hi"}]
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    assert not prompt(messages=[*HI, {"role": "assistant", "content": [call]}]).continue_final
    answer = {"role": "assistant", "content": "{"}
    assert (
        refusal(messages=[*HI, answer], output_format={"type": "json_schema", "schema": SCHEMA}).param
        == "messages"
    )


def test_blocks_in_the_wrong_role_or_without_their_fields() -> None:
    """A 400 that names the field."""
    result = {"type": "tool_result", "tool_use_id": "t"}
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}

    def of(role: str, block: Any) -> str | None:
        return refusal(messages=[{"role": role, "content": [block]}]).param

    assert of("assistant", result) == "messages[0].content[0].type"
    assert of("user", call) == "messages[0].content[0].type"
    assert of("user", {"type": "text"}) == "messages[0].content[0].text"
    assert of("user", {"type": "tool_result"}) == "messages[0].content[0].tool_use_id"
    assert of("assistant", {"type": "tool_use", "id": "t"}) == "messages[0].content[0].name"
    assert of("user", {"type": "document"}) == "messages[0].content[0].source"
    for content in ("", [{"type": "made_up"}]):  # of the only message, nothing is left
        assert refusal(messages=[{"role": "assistant", "content": content}]).param == "messages"
    assert refusal(messages=[]).param == "messages"
    assert refusal(messages=[{"role": "wizard", "content": "x"}]).param == "messages[0].role"


@pytest.mark.parametrize(
    ("thinking", "is_on", "budget", "shown"),
    [
        (None, False, None, "hidden"),
        ({"type": "disabled"}, False, None, "hidden"),
        ({"type": "between_tools"}, False, None, "hidden"),
        ({"type": "enabled", "budget_tokens": 5}, True, 5, "shown"),
        ({"type": "enabled", "budget_tokens": 4096, "display": "omitted"}, True, 4096, "omitted"),
        ({"type": "enabled"}, True, None, "shown"),
        ({"type": "adaptive", "display": "summarized"}, True, None, "shown"),
    ],
)
def test_thinking(thinking: Any, is_on: bool, budget: int | None, shown: str) -> None:
    """The template is told whether to think, the worker for how long, and the rendering whether to show it."""
    found = request(thinking=thinking, output_config={"effort": "high"})
    [said] = found.prompts
    assert isinstance(said, ChatPrompt)
    assert said.template_arguments == {"enable_thinking": is_on, "reasoning_effort": "high"}
    assert found.max_reasoning_tokens == budget
    assert found.options is not None
    assert found.options.thinking == shown  # type: ignore[attr-defined]


def test_thoughts_come_back_without_their_text() -> None:
    """A block whose text was omitted has it in its signature; a signature that is not ours carries nothing."""
    from api.anthropic.messages import signature

    def of(signed: str) -> Any:
        block = {"type": "thinking", "thinking": "", "signature": signed}
        said = {"role": "assistant", "content": [block, {"type": "text", "text": "So."}]}
        return prompt(messages=[*HI, said, *HI]).messages[1]

    assert of(signature.of_omitted("hm é"))["reasoning_content"] == "hm é"
    for other in ("", "EqQB", "mlxpool.!", "mlxpool.gA=="):
        assert "reasoning_content" not in of(other)


def test_the_format_of_the_answer() -> None:
    """A schema is a grammar, under the new name and the old one."""
    wanted = {"type": "json_schema", "schema": SCHEMA}
    expected = grammar.for_json_schema(SCHEMA)
    assert request(output_config={"format": wanted}).grammar == expected
    assert request(output_format=wanted).grammar == expected
    assert request(output_config={"format": wanted}, output_format=wanted).grammar == expected
    other = {"type": "json_schema", "schema": {"type": "string"}}
    assert refusal(output_config={"format": wanted}, output_format=other).param == "output_config.format"
    assert (
        refusal(output_config={"format": {"type": "xml", "schema": {}}}).param == "output_config.format.type"
    )


def test_what_is_ignored_is_named() -> None:
    """At every depth; what has no effect on any answer is not."""
    found = request(
        context_management={"edits": []},
        container="c",
        inference_geo="eu",
        metadata={"user_id": "u", "other": 1},
        service_tier="standard_only",
        cache_control={"type": "ephemeral"},
        output_config={"task_budget": {}},
        betas=["b"],
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi", "made_up": 1}]}],
    )
    assert set(found.ignored) == {
        "context_management",
        "container",
        "inference_geo",
        "metadata.other",
        "output_config.task_budget",
        "messages[0].content[0].made_up",
    }
    document = {"type": "document", "source": {"type": "text", "data": "D"}, "citations": {"enabled": True}}
    assert request(messages=[{"role": "user", "content": [document]}]).ignored == [
        "messages[0].content[0].citations"
    ]


def test_state_on_anthropic_servers() -> None:
    """What refers to it is refused: without it, the prompt would be another one."""
    assert refusal(thread={"type": "create"}).param == "thread"
    assert refusal(thread={"type": "create"}).code == "thread_unsupported_request"
    assert refusal(compaction={"type": "summarize"}).param == "compaction"


def test_the_stop_sequences() -> None:
    """More than OpenAI's four; an empty one is refused."""
    many = [f"s{i}" for i in range(64)]
    assert request(stop_sequences=many).stop == many
    assert refusal(stop_sequences=[*many, "x"]).param == "stop_sequences"
    assert refusal(stop_sequences=[""]).param == "stop_sequences[0]"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": 5},
        {"max_tokens": 0},
        {"max_tokens": "5"},
        {"temperature": 2.1},
        {"top_k": -2},
        {"stop_sequences": ["a"]},
        {"stop_sequences": "a"},
        {"stop_sequences": [""]},
        {"thinking": {"type": "on"}},
        {"thinking": {"type": "enabled", "budget_tokens": 0}},
        {"service_tier": "flex"},
        {"tools": [{"name": "f", "input_schema": {}}]},
        {"tools": [{"name": 5}]},
        {"metadata": {"user_id": 5}},
        {"output_config": {"effort": "huge"}},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{}]}]},
        {"zzz": 1},
    ],
    ids=json.dumps,
)
def test_the_description_agrees_with_the_parser(fields: dict[str, Any]) -> None:
    """The schema in `/openapi.json` accepts what the parser accepts."""
    body = {"messages": HI} | fields
    document = openapi.document(Settings())
    schema = {"$ref": "#/components/schemas/AnthropicMessagesBody", "components": document["components"]}
    try:
        parse(json.dumps(body).encode())
        is_parsed = True
    except RequestError:
        is_parsed = False
    assert Draft202012Validator(json.loads(json.dumps(schema))).is_valid(body) == is_parsed
