"""The plain input of a custom tool is extracted from JSON, however that is cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.openai.custom_input import InputExtractor


def extracted(*parts: str) -> str:
    """The concatenation of what was returned, which is also the attribute."""
    extractor = InputExtractor()
    text = "".join(extractor.feed(part) for part in parts) + extractor.finish()
    assert extractor.text == text
    return text


@given(st.text(), st.booleans(), st.data())
def test_any_text_in_any_pieces(text: str, is_ascii: bool, data: st.DataObject) -> None:
    """Escapes and characters of two halves may be cut anywhere."""
    encoded = json.dumps({"input": text}, ensure_ascii=is_ascii)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(encoded)), max_size=6)) | {0, len(encoded)})
    parts = [encoded[a:b] for a, b in itertools.pairwise(cuts)]
    assert extracted(*parts) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "abc', "abc"),
        ('{"input": "a\\', "a"),
        ('{"input": "a\\u00e', "a"),
        ('{ "input" : "a" } ', "a"),
        ('{"input": "a\nb"}', "a\nb"),
        ('{"other": "x", "input": "a"}', "a"),
        ('{"code": "a"}', '{"code": "a"}'),
        ("print(1)", "print(1)"),
        ("", ""),
        ('{"inp"}', '{"inp"}'),
        ('{"input": 5', '{"input": 5'),
    ],
)
def test_what_models_write(arguments: str, text: str) -> None:
    """A call that was cut, and one that is not of the expected form: nothing is lost."""
    assert extracted(arguments) == text
    assert extracted(*arguments) == text


@pytest.mark.parametrize("start", ['{"input":"', ' {\n "input" : "'])
def test_a_call_cut_before_its_input_is_empty(start: str) -> None:
    """By the limit on tokens, at any character: the client does not get a part of the JSON as the input."""
    assert [extracted(*start[:end]) for end in range(len(start) + 1)] == [""] * (len(start) + 1)
