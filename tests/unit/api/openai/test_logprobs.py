"""Log-probabilities line up with the text, however it is held back and cut."""

from __future__ import annotations

import codecs

from hypothesis import given
from hypothesis import strategies as st

from api.openai.logprobs import Item, LogprobAligner, chat_items, legacy_arrays
from common.protocol import Delta, TokenLogprob


def run(tokens: list[bytes], texts: list[str]) -> list[list[Item]]:
    """The items emitted with each token's text, and at the end."""
    aligner = LogprobAligner()
    deltas = [
        Delta(i + 1, i, text, TokenLogprob(i, -float(i), data))
        for i, (data, text) in enumerate(zip(tokens, texts, strict=True))
    ]
    return [*(aligner.take(delta) for delta in deltas), aligner.finish()]


def shape(steps: list[list[Item]]) -> list[list[tuple[str, bytes]]]:
    return [[(item.text, item.data) for item in items] for items in steps]


def test_text_at_once() -> None:
    """If nothing is held back, each token's item is emitted with its text."""
    assert shape(run([b"a", b" b"], ["a", " b"])) == [[("a", b"a")], [(" b", b" b")], []]


def test_text_held_back() -> None:
    """The items wait for their text."""
    assert shape(run([b"a", b"b", b"c"], ["", "", "abc"])) == [
        [],
        [],
        [("a", b"a"), ("b", b"b"), ("c", b"c")],
        [],
    ]


def test_a_token_that_is_cut_by_a_stop_string() -> None:
    """Its item is cut to the text that the client got, and those after it are dropped."""
    assert shape(run([b"ab", b"cde", b"f"], ["ab", "", "c"])) == [[("ab", b"ab")], [], [], [("c", b"c")]]


def test_a_token_completely_inside_a_stop_string() -> None:
    """It has no item, and neither has an end-of-text token."""
    assert shape(run([b"ab", b"END", b"<eos>"], ["ab", "", ""])) == [[("ab", b"ab")], [], [], []]


def test_a_character_of_several_tokens() -> None:
    """Its items are emitted together, each with its own bytes."""
    smile = "😀".encode()
    assert shape(run([smile[:2], smile[2:], b"x"], ["", "😀", "x"])) == [
        [],
        [("", smile[:2]), ("😀", smile[2:])],
        [("x", b"x")],
        [],
    ]


def test_bytes_that_are_not_a_character() -> None:
    """Their item has the bytes of the replacement, as the text has."""
    assert shape(run([b"\xf0\x9f", b"hi"], ["", "\ufffdhi"])) == [
        [],
        [("", b""), ("\ufffdhi", "\ufffdhi".encode())],
        [],
    ]


def test_half_a_character_at_the_end() -> None:
    """A character that the answer's end cuts is not in the text; its tokens keep their bytes."""
    assert shape(run([b"a", b"b\xf0", b"\x9f"], ["a", "b", ""])) == [
        [("a", b"a")],
        [],
        [],
        [("b", b"b\xf0"), ("", b"\x9f")],
    ]


def test_half_a_character_behind_a_stop_string() -> None:
    """A token that ends inside a character is cut like any other if a stop string ends the text before it."""
    assert shape(run([b"a", b"bc\xf0"], ["a", "b"])) == [[("a", b"a")], [], [("b", b"b")]]


def test_half_a_character_from_an_older_worker() -> None:
    """What an older worker releases as a replacement belongs to the last token."""
    assert shape(run([b"a", b"\xf0"], ["a", "\ufffd"])) == [
        [("a", b"a")],
        [],
        [("\ufffd", "\ufffd".encode())],
    ]


def test_a_first_space_that_a_template_swallows() -> None:
    """Sentencepiece's dummy prefix is in neither the text nor the items."""
    assert shape(run([b" The", b" cat"], ["The", " cat"])) == [[("The", b"The")], [(" cat", b" cat")], []]


@given(
    tokens=st.lists(
        st.one_of(
            st.binary(max_size=4),
            st.text(max_size=3).map(str.encode),
            st.sampled_from([b"\xe2", b"\x82\xac", b"\xf0\x9f", b"\x98\x80", b"a\xf0", b"\x9f\x98\x80b"]),
        ),
        max_size=12,
    ),
    data=st.data(),
)
def test_items_are_exactly_the_text(tokens: list[bytes], data: st.DataObject) -> None:
    """For any tokens, held back and cut anywhere: text and bytes of all items together are the text.

    The bytes of a character that is incomplete at the end are the exception: they may follow.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    whole = "".join(decoder.decode(token) for token in tokens) + decoder.decode(b"", final=True)
    kept = whole[: data.draw(st.integers(0, len(whole)))]
    decoder.reset()
    texts, out, reached = [], 0, 0
    for i, token in enumerate(tokens):
        reached += len(decoder.decode(token))
        end = (
            len(kept)
            if i == len(tokens) - 1
            else min(data.draw(st.integers(out, max(out, reached))), len(kept))
        )
        texts.append(kept[out:end])
        out = end
    if kept.startswith(" ") or not whole.startswith(" "):
        items = [item for step in run(tokens, texts) for item in step]
        assert "".join(item.text for item in items) == kept
        num_incomplete = len(decoder.getstate()[0])
        if not num_incomplete or kept == whole:
            assert b"".join(item.data for item in items) == kept.encode()


def test_chat_form() -> None:
    """OpenAI's names, and minus infinity as a number."""
    item = Item(
        "é", "é".encode(), -0.5, [TokenLogprob(1, -0.5, "é".encode()), TokenLogprob(2, -1e30, b"\xff")]
    )
    assert chat_items([item]) == [
        {
            "token": "é",
            "logprob": -0.5,
            "bytes": [195, 169],
            "top_logprobs": [
                {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                {"token": "\ufffd", "logprob": -9999.0, "bytes": [255]},
            ],
        }
    ]


def test_legacy_form() -> None:
    """Four arrays; the sampled token is always among the most likely, and offsets count characters."""
    items = [
        Item("né", "né".encode(), -3.0, [TokenLogprob(1, -0.1, b"a")]),
        Item("b", b"b", -0.2, [TokenLogprob(2, -0.2, b"b"), TokenLogprob(3, -4.0, b"\xf0")]),
    ]
    assert legacy_arrays(items, 10) == {
        "tokens": ["né", "b"],
        "token_logprobs": [-3.0, -0.2],
        "top_logprobs": [{"a": -0.1, "né": -3.0}, {"b": -0.2, "bytes:\\xf0": -4.0}],
        "text_offset": [10, 12],
    }
