"""What a client's conversations may cost the intake thread: clients choose shapes, arguments and what a template refuses."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import pytest

from common.errors import RequestError
from tests.unit.worker.text.templates.traits import (
    CHATML,
    TRAITS,
    Model,
    assistant,
    call,
    result,
    system,
    user,
)
from worker.text.templates.shapes import make_skeleton, shape_of


def irregular(num_messages: int, text: str = "text") -> list[dict[str, Any]]:
    """A conversation without repetitions, in which each change of an adaptation makes a difference."""
    rng = random.Random(num_messages)  # noqa: S311 (reproducible)
    messages: list[dict[str, Any]] = []
    for number in range(num_messages):
        match rng.randrange(5):
            case 0:
                messages.append(system(text))
            case 1:
                messages.append(assistant(rng.choice([text, ""])))
            case 2:
                arguments: list[Any] = ["cut", {"k": 1}]
                calls = [call(3 * number + i, rng.choice(arguments)) for i in range(rng.randint(1, 3))]
                messages.append(assistant(text, *calls, reasoning_content="thought"))
            case 3:
                messages.append(result(rng.randrange(3 * number + 1), text))
            case _:
                messages.append(user(text))
    return messages


def count_rendered(model: Model) -> list[int]:
    """The lengths of the conversations that the template is given from now on."""
    rendered: list[int] = []
    apply = model.tokenizer._tokenizer.apply_chat_template

    def record(messages: Any, **options: Any) -> Any:
        rendered.append(len(messages))
        return apply(messages, **options)

    model.tokenizer._tokenizer.apply_chat_template = record
    return rendered


@pytest.mark.parametrize(("num_messages", "max_rendered"), [(12, 4_000), (40, 4_000), (1_000, 8_000)])
def test_a_conversation_that_cannot_be_rendered_completely(num_messages: int, max_rendered: int) -> None:
    """The search ends after a few thousand messages, however many adaptations there are."""
    model = Model(
        CHATML.replace("{{ m.content }}", "{{ '' if 'probe0001content' in m.content else m.content }}")
    )
    rendered = count_rendered(model)
    model.ids([user("A."), user("B."), *irregular(num_messages)])
    assert len(rendered) > 3
    assert sum(rendered) < max_rendered


def test_plans_do_not_keep_what_clients_send() -> None:
    """Neither the arguments of the template nor the shapes of very long conversations."""
    model = Model(CHATML)
    for number in range(3):
        model.ids([user("A.")], template_arguments={"text": f"{number}" * 100_000})
    model.ids(irregular(3_000))
    model.ids([user("A."), assistant("", *(call(i, {}) for i in range(3_000)))])
    assert model.format.renderer is not None
    plans = model.format.renderer._planner._plans
    assert len(plans) == 3
    assert len(repr(list(plans))) < 10_000


def test_a_refused_conversation_is_not_copied_for_each_attempt() -> None:
    """The adaptations of long texts are made one after the other."""
    refuses = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('no') }}{% endif %}",
    )
    model = Model(refuses)
    messages = irregular(14, "forbidden " + "x" * 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="refuses"):
            model.ids(messages)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 30_000_000


def test_each_call_of_a_long_skeleton_has_its_own_id() -> None:
    """Otherwise the results of a long conversation would be taken for those of other calls."""
    messages = [user("A.")]
    for number in range(1_200):
        messages += [assistant("x" * (number % 7 % 2), *(call(0, {}) for _ in range(1 + number % 11 % 3)))]
    messages.append(assistant("", *(call(0, {}) for _ in range(150))))
    skeleton = make_skeleton(shape_of(messages))
    ids = [each["id"] for message in skeleton.messages for each in message.get("tool_calls", [])]
    assert len(skeleton.messages) > 1_000
    assert len(set(ids)) == len(ids)
    assert {len(each) for each in ids} == {9}


def test_an_empty_message_is_continued_even_if_other_empty_ones_are_left_out() -> None:
    """The answer does not continue the user's text."""
    model = Model(TRAITS["no empty assistant"])
    messages = [user("A."), assistant(""), user("B."), assistant("")]
    prompt = model.prompt(messages, continue_final=True)
    assert prompt.endswith("<|im_start|>user\nB.<|im_end|>\n<|im_start|>assistant\n")
