"""Admission control: which of the jobs that this worker holds may start now.

Pure decisions; owned and called by the generation loop, on its thread. The numbers mark the rules in the code.

1. Jobs start in the order of their arrival. None overtakes another, so none starves.
2. A job starts when its KV cache has room next to the running ones (`has_room`), or when nothing else is running.
3. A poison candidate, a job that was running when workers crashed repeatedly, starts only when nothing else is running, and
   nothing starts next to it until it has produced a new token. If it crashes this worker too, no other job is affected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from common.protocol import GenerationJob
from worker.loop.messages import Admit

HasRoom = Callable[[GenerationJob, int, int], bool]


class Admission:
    """The waiting jobs, in order of arrival; `len()` is their number.

    Attributes:
        poison_candidate: The job id of a poison candidate that runs and has not been cleared yet.

    Args:
        has_room: As `worker.loop.engine.Engine.has_room`.
    """

    def __init__(self, has_room: HasRoom) -> None:
        self.poison_candidate: str | None = None
        self._has_room = has_room
        self._waiting: deque[Admit] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, message: Admit) -> None:
        """Append a job to the waiting ones."""
        self._waiting.append(message)

    def pop_admissible(self, num_running: int) -> Admit | None:
        """Remove and return the first waiting job if it may start now, else None.

        Args:
            num_running: Sequences that the engine holds.
        """
        if not self._waiting or self.poison_candidate is not None:  # 3
            return None
        first = self._waiting[0]  # 1
        if num_running and (first.is_poison_candidate or not self._fits(first)):  # 2, 3
            return None
        if first.is_poison_candidate:
            self.poison_candidate = first.job.job_id
        return self._waiting.popleft()

    def _fits(self, message: Admit) -> bool:
        return self._has_room(message.job, len(message.prompt_token_ids), len(message.replayed_token_ids))

    def clear_poison_candidate(self, job_id: str) -> None:
        """Let others start again, if `job_id` is the poison candidate: it has produced a new token, or has ended."""
        if job_id == self.poison_candidate:
            self.poison_candidate = None

    def remove(self, job_id: str, execution_id: str | None = None) -> Admit | None:
        """Remove and return a waiting job.

        Args:
            execution_id: Remove only this execution of the job; None: any.

        Returns:
            None if no such job is waiting.
        """
        for message in self._waiting:
            if message.job.job_id == job_id and execution_id in (None, message.execution_id):
                self._waiting.remove(message)
                return message
        return None
