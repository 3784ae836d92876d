"""Numbers of a stream's frames: one each, however the frames come, and none for those that the client has."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.http.sse import FrameNumbers, frame

FRAMES = [frame(b'{"a":"\\n\\n"}'), frame(b"{}", event="ping"), frame(b"[DONE]"), frame(b"1", event="x")]


@given(cuts=st.lists(st.integers(0, 4), max_size=4), skip=st.integers(0, 6))
def test_frames_are_numbered_however_they_come(cuts: list[int], skip: int) -> None:
    """In any batches, empty ones included: the same bytes, without the first `skip` frames."""
    edges = [0, *sorted(cuts), 4]
    numbers = FrameNumbers("s", skip)
    sent = [numbers.number(b"".join(FRAMES[a:b])) for a, b in itertools.pairwise(edges)]
    expected = [b"id: s:%d\n%b" % (k, each) for k, each in enumerate(FRAMES) if k >= skip]
    assert b"".join(sent) == b"".join(expected)


@pytest.mark.parametrize("each", FRAMES)
def test_one_frame(each: bytes) -> None:
    """The usual case, with and without an event's name."""
    assert FrameNumbers("s").number(each) == b"id: s:0\n" + each
