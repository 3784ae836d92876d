"""A stored answer's events from its journals' start, then live, in any API process.

Made by `AnswerStore.follow`, delivered like an `ActiveRequest`. Ends nothing when it is released: other clients may follow
the same answer. Must not know HTTP.
"""

from __future__ import annotations

import asyncio

from api.generation.events.choices import Choices
from api.generation.events.relay import Relay
from api.generation.front_end import ChoiceEvents
from api.generation.stored_answer import StoredAnswer
from common import names
from common.protocol import Finished


class FollowedAnswer:
    """An `EventSource`; see the module."""

    def __init__(self, answer: StoredAnswer, relay: Relay) -> None:
        self.job_id = answer.id
        # Nothing is published there if the answer is not detached; then only what is in the journals is found.
        channel = names.stream_channel(answer.id)
        self._choices = Choices(answer.record.job_ids, channel, relay, in_order=True)
        self._choices.read_journals(asyncio.get_running_loop().time())

    @property
    def is_done(self) -> bool:
        return self._choices.is_done

    @property
    def is_aborted(self) -> bool:
        return self._choices.is_aborted

    async def take(self) -> ChoiceEvents:
        return await self._choices.take()

    def finished(self) -> list[Finished]:
        return self._choices.ends()

    def release(self) -> None:
        self._choices.release()
