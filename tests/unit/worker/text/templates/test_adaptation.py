"""Conversations of all shapes with templates of all traits: nothing raises, nothing is lost."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from mlx_lm.chat_templates import deepseek_v32

from common.errors import RequestError
from tests.unit.worker.text.templates.traits import (
    CHATML,
    TRAITS,
    Model,
    assistant,
    call,
    result,
    system,
    tool,
    user,
)

MODELS = {name: Model(template) for name, template in TRAITS.items()}
TOOLS = [tool(description="Finds things.", parameters={"type": "object", "properties": {}})]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Messages in any order of roles, the texts of system messages, and those of the others."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    system_texts: list[str] = []
    num_calls = 0

    def text(kind: str) -> str:
        return f"{kind}{len(messages):02}-{num_calls:02}."

    for role in draw(st.lists(st.sampled_from("suuaact"), min_size=1, max_size=9)):
        match role:
            case "s":
                system_texts.append(text("system"))
                messages.append(system(system_texts[-1]))
            case "u":
                texts.append(text("user"))
                messages.append(user(texts[-1]))
            case "a":
                texts.append(text("assistant"))
                more = {"reasoning_content": "thought"} if draw(st.booleans()) else {}
                messages.append(assistant(texts[-1], **more))
            case "c":
                content = draw(st.sampled_from(["", None, text("spoken")]))
                texts += [content] if content else []
                numbers = range(num_calls, num_calls + draw(st.integers(1, 2)))
                values = [text(f"value{number}") for number in numbers]
                arguments = [
                    draw(st.sampled_from([{"key": value}, f'{{"key": "{value}'])) for value in values
                ]
                num_calls += len(numbers)
                messages.append(
                    assistant(content, *(call(n, a) for n, a in zip(numbers, arguments, strict=True)))
                )
                for number in numbers:
                    if draw(st.booleans()):
                        texts.append(text(f"result{number}"))
                        messages.append(result(number, texts[-1]))
            case _:
                texts.append(text("orphan"))
                messages.append(result(99, texts[-1]))
    return messages, system_texts, texts


@pytest.mark.parametrize("name", TRAITS)
@hypothesis.given(conversation=conversations(), has_tools=st.booleans())
@hypothesis.settings(max_examples=50)
def test_every_text_is_in_the_prompt(name: str, conversation: Any, has_tools: bool) -> None:
    """Each once and in order, system messages among themselves; and the arguments of each call."""
    messages, system_texts, texts = conversation
    prompt = MODELS[name].prompt(messages, TOOLS if has_tools else None)
    for group in (system_texts, texts):
        assert [text for text in group if prompt.count(text) != 1] == []
        positions = [prompt.index(text) for text in group]
        assert positions == sorted(positions)
    for message in messages:
        for each in message.get("tool_calls", []):
            arguments = each["function"]["arguments"]
            value = arguments["key"] if isinstance(arguments, dict) else arguments.rpartition('"')[2]
            assert value in prompt


def test_a_template_that_supports_everything_gets_the_conversation_unchanged() -> None:
    """The prompt is what the template makes of the messages as they are."""
    model = MODELS["complete"]
    messages = [
        system("Be kind."),
        user("Hi."),
        user("Hello?"),
        assistant("Let me see.", call(0, {"a": 1}), call(1, {})),
        result(0, "one"),
        result(1, "two"),
        system("Be brief."),
        assistant("Yes."),
    ]
    expected = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert model.prompt(messages) == expected


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        (
            "system first, else raises",
            [user("A."), assistant("B."), system("C."), system("D.")],
            "system\nC.\n\nD.|user\nA.|assistant\nB.",
        ),
        ("no system, raises", [system("C."), user("A."), assistant("B.")], "user\nC.\n\nA.|assistant\nB."),
        ("no system, lost", [assistant("B."), system("C.")], "user\nC.|assistant\nB."),
        (
            "alternates",
            [user("A."), user("B."), assistant("C."), assistant("D."), user("E.")],
            "user\nA.\n\nB.|assistant\nC.\n\nD.|user\nE.",
        ),
        (
            "user first",
            [assistant("B."), user("A.")],
            "user\n|assistant\nB.|user\nA.",
        ),
        ("needs a user", [system("C.")], "system\nC.|user\n"),
        ("no empty assistant", [user("A."), assistant(""), user("B.")], "user\nA.|user\nB."),
        (
            "text next to calls is lost",
            [user("A."), assistant("B.", call(0, {}))],
            'user\nA.|assistant\nB.|assistant\n<tool_call>\n{"name": "lookup", "arguments": {}}\n</tool_call>',
        ),
        ("contents are parts", [user("A."), assistant(None), user("B.")], "user\nA.|assistant\n|user\nB."),
    ],
)
def test_smallest_changes(name: str, messages: Any, expected: str) -> None:
    """What is changed for each trait, turns separated by bars."""
    turns = MODELS[name].prompt(messages).removesuffix("<|im_start|>assistant\n").split("<|im_end|>\n")
    assert "|".join(turn.removeprefix("<|im_start|>") for turn in turns[:-1]) == expected


def test_parallel_calls_one_after_the_other() -> None:
    """Each call is followed by its own result, if the template renders only one call per message."""
    messages = [
        user("A."),
        assistant("", call(0, {"k": 1}), call(1, {"k": 2})),
        result(0, "one"),
        result(1, "two"),
    ]
    for name in ("one call", "one call, others lost"):
        prompt = MODELS[name].prompt(messages)
        positions = [prompt.index(text) for text in ('{"k": 1}', "one<", '{"k": 2}', "two<")]
        assert positions == sorted(positions)


def test_arguments_that_are_not_an_object() -> None:
    """Those of a call that was cut become the value of an object; the others stay as they are."""
    messages = [
        user("A."),
        assistant("", call(0, '{"city": "Be')),
        result(0, "?"),
        assistant("", call(1, {"k": 1})),
    ]
    prompt = MODELS["arguments are objects"].prompt(messages)
    assert 'arguments={"city": "Be' in prompt
    assert "k=1" in prompt


def test_a_function_without_a_description() -> None:
    """It gets an empty one if the template cannot do without."""
    model = Model(TRAITS["needs descriptions"])
    object.__setattr__(
        model.format, "parse_call", lambda *_: {}
    )  # so that the template describes the functions
    assert "// lookup" in model.prompt([user("A.")], [tool()])


@pytest.mark.parametrize("name", ["complete", "alternates", "no system, raises", "trims", "one call"])
def test_a_growing_conversation_keeps_its_beginning(name: str) -> None:
    """The prompt of each turn begins with that of the turn before, so that cached prefixes are used."""
    messages = [system("S."), user("U.")]
    before = ""
    for turn in range(8):
        prompt = MODELS[name].prompt(messages)
        assert prompt.startswith(before)
        before = prompt
        messages += (
            [
                assistant(f"A{turn}.", call(turn, {"k": turn})),
                result(turn, f"R{turn}."),
                user(f"U{turn}."),
            ]
            if turn % 2
            else [assistant(f"A{turn}."), user(f"U{turn}.")]
        )


def test_a_known_shape_is_not_probed_again() -> None:
    """A second conversation of the same shape, and a longer one of repetitions, cost one rendering each."""
    model = Model(CHATML)
    turns = [user("A."), assistant("B.")]
    rendered = []
    apply = model.tokenizer._tokenizer.apply_chat_template

    def record(messages: Any, **options: Any) -> Any:
        rendered.append(len(messages))
        return apply(messages, **options)

    model.tokenizer._tokenizer.apply_chat_template = record
    model.ids([*turns * 2, user("C.")])
    assert len(rendered) == 2
    model.ids([*turns * 2, user("D.")])
    model.ids([*turns * 9, user("C.")])
    assert len(rendered) == 4


def test_a_text_that_the_template_refuses() -> None:
    """If no change helps it is a 400 with the template's reason; a change that helps is made."""
    refuses = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('not this') }}{% endif %}",
    )
    with pytest.raises(RequestError, match="refuses these messages: not this") as refused:
        Model(refuses).ids([user("forbidden")])
    assert (refused.value.status, refused.value.param) == (400, "messages")
    only_system = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'system' and 'a' in m.content %}{{ raise_exception('no') }}{% endif %}",
    )
    assert Model(only_system).prompt([system("a"), user("b")]).startswith("<|im_start|>user\na\n\nb")


def test_json_of_arguments_is_exact() -> None:
    """A template that appends arguments to a string gets JSON text."""
    prompt = MODELS["arguments are text"].prompt(
        [user("A."), assistant("", call(0, {"k": "ü"})), result(0, "R.")]
    )
    assert f"text: {json.dumps({'k': 'ü'}, ensure_ascii=False)}" in prompt


def test_a_user_message_after_a_result() -> None:
    """Some templates want the assistant to speak in between: an empty message does."""
    prompt = MODELS["no user after a result"].prompt(
        [user("A."), assistant("", call(0, {})), result(0, "R."), user("B.")]
    )
    assert "<|im_start|>tool\nR.<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nB." in prompt


def test_a_template_that_is_a_function() -> None:
    """DeepSeek V3.2's raises if the last message is an answer without reasoning; then reasoning is off. Arguments are JSON text."""
    model = Model(
        deepseek_v32.apply_chat_template,
        ["<think>", "</think>", "<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"],
    )
    messages = [
        system("S."),
        user("U. <\uff5cUser\uff5c>"),
        assistant("", call(0, {"k": "v"})),
        result(0, "R."),
        assistant("A."),
    ]
    ids = model.ids(messages)
    prompt = model.tokenizer.decode(ids)
    positions = [prompt.index(text) for text in ("S.", "U.", "lookup", ">v<", "R.", "</think>A.")]
    assert positions == sorted(positions)
    assert ids.count(model.tokenizer.convert_tokens_to_ids("<\uff5cUser\uff5c>")) == 1
    assert model.prompt(messages, continue_final=True).endswith("</think>A.")
    assert model.prompt([user("U.")]).endswith("<think>")


def test_a_long_conversation_that_needs_all_changes() -> None:
    """The search is bounded; then the strongest changes come, and nothing is lost."""
    messages: list[dict[str, Any]] = []
    for number in range(600):
        kinds = [system, user, assistant]
        messages.append(kinds[number * number % 7 % 3](f"text{number:03}."))
        if number % 5 == 0:
            messages += [assistant("", call(number, {"k": 1})), result(number, f"text{number:03}r.")]
    renderings = 0
    model = Model(TRAITS["alternates, nothing else"])
    apply = model.tokenizer._tokenizer.apply_chat_template

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal renderings
        renderings += 1
        return apply(*arguments, **options)

    model.tokenizer._tokenizer.apply_chat_template = count
    prompt = model.prompt(messages)
    assert all(prompt.count(m["content"]) == 1 for m in messages if m["content"])
    assert renderings < 100
