"""An answer that continues the last message of the assistant."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import RequestError
from common.protocol import ChatPrompt, GenerationJob
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
from worker.text import answer_parser, prompts
from worker.text.detokenizer import TokenBytes
from worker.text.templates.renderer import _END

ALWAYS_THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
FULL = [
    system("S."),
    user("U."),
    assistant("", call(0, {"k": 1}), reasoning_content="Hm."),
    result(0, "R."),
    assistant("The answer is ", reasoning_content="So."),
]


@pytest.mark.parametrize("name", [*TRAITS, "always thinks"])
def test_the_prompt_ends_with_the_text(name: str) -> None:
    """Exactly, white space included, whatever the template does to the end of a message; nothing before it is lost."""
    model = Model({**TRAITS, "always thinks": ALWAYS_THINKS}[name])
    prompt = model.prompt(FULL, continue_final=True)
    assert prompt.endswith("The answer is ")
    for text in ("S.", "U.", "lookup", "R."):
        assert text in prompt
    assert _END not in prompt
    assert model.prompt([user("U."), assistant("  x ")], continue_final=True).endswith("  x ")


def test_an_empty_text_begins_the_turn() -> None:
    """The prompt ends with the beginning of the assistant's turn."""
    assert (
        Model(CHATML)
        .prompt([user("U."), assistant("")], continue_final=True)
        .endswith("<|im_start|>assistant\n")
    )


def test_control_tokens_in_the_text() -> None:
    """They are text, and the answer is content even if the text ends with the marker of reasoning."""
    model = Model(ALWAYS_THINKS)
    prompt = ChatPrompt([user("U."), assistant("Use <think>")], continue_final=True)
    job = GenerationJob(job_id="a", model="m", channel="c", prompt=prompt)
    ids = prompts.tokenize(job, model.tokenizer, 1000, model.format)
    assert model.tokenizer.decode(ids).endswith("Use <think>")
    assert model.tokenizer.convert_tokens_to_ids("<think>") not in ids
    parser = answer_parser.make_parser(job, model.format, ids, TokenBytes(model.tokenizer))
    assert parser is not None
    assert not parser.is_reasoning
    assert parser.feed(" ") + parser.feed("here") == [" here"]


def test_without_a_template() -> None:
    """The role mapping gets neither an end nor a new prefix."""
    assert Model(None).prompt([user("U."), assistant("A ")], continue_final=True) == "USER: U.\nASSISTANT: A "


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML, [assistant("A"), user("U")], "Only an assistant message"),
        (CHATML, [user("U"), assistant("", call(0, {}))], "Only an assistant message"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            [user("U"), assistant("A")],
            "cannot be continued",
        ),
    ],
)
def test_what_cannot_be_continued(template: str, messages: Any, reason: str) -> None:
    """A 400 that says why."""
    with pytest.raises(RequestError, match=reason) as refused:
        Model(template).ids(messages, continue_final=True)
    assert (refused.value.status, refused.value.param) == (400, "messages")
