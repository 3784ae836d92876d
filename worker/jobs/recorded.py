"""RQ's own commands as part of a script: recorded on a pipeline that is never executed, then run only if a condition holds.

RQ writes its bookkeeping as a series of commands. Under WATCH and MULTI they have to be retried whenever a watched key
changes, and each heartbeat changes some. A script checks the condition and runs them in one step. Used by `executions` and
`takeover`; `api/generation/job_queue.py` enqueues in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis

if TYPE_CHECKING:
    from redis.client import Pipeline

# Appended to a script that sets `i` to the index of the first recorded command in ARGV: each is its number of words, then
# its words.
RUN_RECORDED = """
while i <= #ARGV do
  local last = i + ARGV[i]
  redis.call(unpack(ARGV, i + 1, last))
  i = last + 1
end
"""


def record(connection: redis.Redis, write: Callable[[Pipeline], Any]) -> list[Any]:
    """The commands that `write` issues on a pipeline, as arguments for RUN_RECORDED. Nothing is sent."""
    pipe = connection.pipeline()
    write(pipe)
    return [word for arguments, _ in pipe.command_stack for word in (len(arguments), *arguments)]
