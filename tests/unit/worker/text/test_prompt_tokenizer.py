"""The tokenizing thread's own tokenizer."""

from __future__ import annotations

import pytest

from common.errors import RequestError
from common.protocol import ChatPrompt, TextPrompt
from tests.unit.worker.text.templates.traits import CHATML, Model, user
from worker.text.prompt_tokenizer import OwnPromptTokenizer


@pytest.mark.parametrize("adds_special_tokens", [True, False])
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_text_that_is_too_long(is_chat: bool, adds_special_tokens: bool) -> None:
    """The error names the limit that there is, in characters: a prompt may be longer than the model's context."""
    model = Model(CHATML)
    tokenizer = OwnPromptTokenizer(model.tokenizer, model.format, 10, {})
    text = "a" * (2**22 + 1)
    prompt = ChatPrompt([user(text)]) if is_chat else TextPrompt(text)
    with pytest.raises(RequestError, match=r"^The text is longer than 4194304 characters\.$"):
        tokenizer.encode(prompt, tool_use=None, grammar=None, adds_special_tokens=adds_special_tokens)
