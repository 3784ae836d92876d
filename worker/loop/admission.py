"""Admission: which of the jobs that this worker holds may start now. Pure; owned by the generation loop.

1. They start in the order in which they came: none is overtaken, so none starves.
2. A job starts when its cache has room beside the others' (`has_room`), or when there are no others.
3. A suspect, which was there when workers died again and again, starts alone, and nothing starts beside it before it has
   a new token: should it be what kills them, it harms nobody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from common.protocol import GenerationJob
from worker.loop.messages import Admit

HasRoom = Callable[[GenerationJob, int, int], bool]


class Admission:
    """See the module.

    Attributes:
        suspect: The job that runs and is not to have company yet.

    Args:
        has_room: As `worker.loop.engine.Engine.has_room`.
    """

    def __init__(self, has_room: HasRoom) -> None:
        self.poison_candidate: str | None = None
        self._has_room = has_room
        self._waiting: deque[Admit] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, message: Admit) -> None:
        """A job came."""
        self._waiting.append(message)

    def next(self, num_running: int) -> Admit | None:
        """The job to start now; it waits no more."""
        if not self._waiting or self.poison_candidate is not None:
            return None
        first = self._waiting[0]
        num_prompt, num_done = len(first.token_ids), len(first.replay)
        if num_running and (first.is_poison_candidate or not self._has_room(first.job, num_prompt, num_done)):
            return None
        if first.is_poison_candidate:
            self.poison_candidate = first.job.job_id
        return self._waiting.popleft()

    def clear_poison(self, job_id: str) -> None:
        """A job that runs has a new token, or has ended."""
        if job_id == self.poison_candidate:
            self.poison_candidate = None

    def remove(self, job_id: str, execution_id: str | None = None) -> Admit | None:
        """Take a job out of the line; None if it (or this run of it) is not in it."""
        for message in self._waiting:
            if message.job.job_id == job_id and execution_id in (None, message.execution_id):
                self._waiting.remove(message)
                return message
        return None
