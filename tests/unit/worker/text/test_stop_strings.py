"""Stop strings: the complete text before them and no character of them, however the text is cut into tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.text.stop_strings import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """The text that is released, and whether a stop string ended it."""
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        out += text
        if stopped:
            return out, True
    return out + matcher.flush(), False


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """The specification: the stop string that ends first wins, of those the one that starts first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@pytest.mark.parametrize(
    ("stops", "pieces", "out"),
    [
        (["stop"], ["one st", "op two"], ("one ", True)),
        (["stop"], ["stop"], ("", True)),
        (["stop"], ["s", "t", "o", "p"], ("", True)),
        (["stop"], ["st", "ay"], ("stay", False)),
        (["stop"], ["a st"], ("a st", False)),
        (["aab"], ["aa", "ab"], ("a", True)),
        (["b", "abc"], ["a", "bc"], ("a", True)),
        (["abc", "bc"], ["xabc"], ("x", True)),
        (["é🌊"], ["caf", "é", "🌊!"], ("caf", True)),
        ([], ["anything"], ("anything", False)),
    ],
)
def test_examples(stops: list[str], pieces: list[str], out: tuple[str, bool]) -> None:
    """Within a piece, across pieces, at the first character, similar strings, overlaps, several at once, non-ASCII."""
    assert run(stops, pieces) == out


@given(
    st.lists(st.text("ab🌊", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.text("ab🌊", max_size=4), max_size=12),
)
def test_the_result_does_not_depend_on_the_cuts(stops: list[str], pieces: list[str]) -> None:
    """Any text in any pieces gives what the complete text gives, and never contains a stop string."""
    out, stopped = run(stops, pieces)
    assert (out, stopped) == expected(stops, "".join(pieces))
    assert not any(stop in out for stop in stops)


def test_text_is_released_early() -> None:
    """Text that cannot be the start of a stop string is released at once."""
    matcher = StopMatcher(["stop"])
    assert matcher.feed("some s") == ("some ", False)
    assert matcher.feed("un") == ("sun", False)


def test_empty_stop_strings_stop_nothing() -> None:
    """A job that another program wrote to Redis may have them; the API refuses them."""
    matcher = StopMatcher(["", "end"])
    assert matcher.feed("no e") == ("no ", False)
    assert matcher.feed("nd") == ("", True)
    assert StopMatcher([""]).feed("text") == ("text", False)
