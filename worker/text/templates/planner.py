"""Chooses how a conversation is adapted to a chat template: the smallest change with which nothing is lost and nothing raises.

The choice is made for a shape of conversation, by rendering its skeleton with one adaptation after the other, and cached. Used by
`renderer`. Independent of tokenizers: it is given a function that renders messages.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import NamedTuple

from worker.text.templates.adaptations import STRONGEST, Adaptation, candidates
from worker.text.templates.shapes import Skeleton, make_skeleton, shape_of
from worker.text.templates.support import Messages, ToolMessageStyle

log = logging.getLogger(__name__)

_MAX_PLANS = 1024
"""Cached; the least recently used one is evicted."""
_MAX_CACHED_SIZE = 1_000
"""Messages and calls of a conversation whose plan is cached: clients choose the shapes, and each may have thousands."""

_MAX_ADAPTED_SIZE = 2_000
_MIN_ADAPTATIONS = 3
"""Bounds on the search, which runs on the intake thread: the messages and calls that are rendered in total, and how many adaptations are
tried however long a conversation is. Beyond them, only the strongest adaptations are tried. Counts, not a time limit: each worker has
to choose the same adaptation. Real templates need up to 14 adaptations of nine messages."""

_WORD = re.compile(r"probe\d+(?:content|(?:name|key|value)\d+)")

Render = Callable[[Messages], str]
"""Renders adapted messages; may raise any exception."""


class _Loss(NamedTuple):
    """What is wrong with a rendering; compared in this order."""

    num_lost: int
    num_out_of_order: int
    num_repeated: int


_NO_LOSS = _Loss(0, 0, 0)


class Planner:
    """See the module.

    Args:
        style: How the template expects calls and results; None: it does not support them.
    """

    def __init__(self, style: ToolMessageStyle | None) -> None:
        self._style = style
        self._plans: OrderedDict[Hashable, Adaptation] = OrderedDict()

    def choose(
        self,
        messages: Messages,
        situation: Hashable,
        render: Render,
        *,
        words: Sequence[str] = (),
        as_text: bool = False,
    ) -> Adaptation:
        """Choose the adaptation of a conversation.

        Args:
            situation: What else the rendering depends on.
            words: Words that must be rendered in addition to those of the conversation.
            as_text: Whether calls become text in any case.
        """
        shape = shape_of(messages)
        key = (shape, situation, as_text)
        if (known := self._plans.get(key)) is not None:
            self._plans.move_to_end(key)
            return known
        chosen = self._search(make_skeleton(shape, words), render, as_text=as_text)
        if _size(messages) > _MAX_CACHED_SIZE:
            return chosen
        self._plans[key] = chosen
        if len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)
        return chosen

    def adapted(self, messages: Messages, *, as_text: bool) -> Iterator[tuple[Adaptation, Messages]]:
        """All adaptations of a conversation that differ, the smallest first."""
        seen: set[bytes] = set()
        limit = max(_MIN_ADAPTATIONS, _MAX_ADAPTED_SIZE // (_size(messages) or 1))
        changes = candidates(messages, self._style, as_text=as_text)
        for adaptation in chain(islice(changes, limit), STRONGEST):
            new = adaptation.apply(messages, self._style)
            digest = hashlib.blake2b(repr(new).encode(errors="surrogatepass")).digest()
            if digest not in seen:
                seen.add(digest)
                yield adaptation, new

    def apply(self, adaptation: Adaptation, messages: Messages) -> Messages:
        """Adapt a conversation."""
        return adaptation.apply(messages, self._style)

    def _search(self, skeleton: Skeleton, render: Render, *, as_text: bool) -> Adaptation:
        best: tuple[_Loss, Adaptation] | None = None
        for adaptation, messages in self.adapted(skeleton.messages, as_text=as_text):
            try:
                text = render(messages)
            except Exception:  # noqa: BLE001, S112 (templates raise any exception)
                continue
            loss = _measure(text, skeleton)
            if loss == _NO_LOSS:
                return adaptation
            if best is None or loss < best[0]:
                best = loss, adaptation
        if best is None:
            return Adaptation()
        log.info("the chat template does not render every text of a conversation (%s)", best[0])
        return best[1]


def _size(messages: Messages) -> int:
    return len(messages) + sum(len(message.get("tool_calls") or ()) for message in messages)


def _measure(text: str, skeleton: Skeleton) -> _Loss:
    positions: dict[str, int] = {}  # of the first occurrence
    repeated_words = set()
    for found in _WORD.finditer(text):
        if positions.setdefault(found[0], found.start()) != found.start():
            repeated_words.add(found[0])
    lost = sum(word not in positions and word not in text for word in skeleton.others)
    out_of_order = repeated = 0
    for words in (skeleton.system, skeleton.contents):
        known = [positions[word] for word in words if word in positions]
        lost += len(words) - len(known)
        out_of_order += sum(a > b for a, b in pairwise(known))
        repeated += sum(word in repeated_words for word in words)
    return _Loss(lost, out_of_order, repeated)
