"""Scripts and parts of scripts that intake, takeover and executions share, and RQ's own commands as part of a script.

RQ writes its bookkeeping as a series of commands. Under WATCH and MULTI they have to be retried whenever a watched key
changes, and each heartbeat changes some. Instead they are recorded on a pipeline that is never executed, and a script checks
a condition and runs them in one step. `api/generation/job_queue.py` enqueues in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis

if TYPE_CHECKING:
    from redis.client import Pipeline

# KEYS: intermediate queue, queue. ARGV: a job id. To the front of the queue, unless another worker has done so.
RETURN_TO_QUEUE = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 1 then return redis.call('LPUSH', KEYS[2], ARGV[1]) end
return 0
"""

# Runs recorded commands, each its number of words and then its words, from ARGV[i] on; `i` is set before. As in a MULTI, the
# error of one does not keep the others from running: `failure` is the first one.
RUN_RECORDED = """
local failure
while i <= #ARGV do
  local last = i + ARGV[i]
  local answer = redis.pcall(unpack(ARGV, i + 1, last))
  if type(answer) == 'table' and answer.err then failure = failure or answer end
  i = last + 1
end
"""


def record(connection: redis.Redis, write: Callable[[Pipeline], Any]) -> list[Any]:
    """The commands that `write` issues on a pipeline, encoded as arguments for RUN_RECORDED. Nothing is sent.

    Raises:
        UnicodeEncodeError: A word cannot be encoded.
        redis.DataError: A word has a type that Redis does not have.
    """
    pipe = connection.pipeline()
    write(pipe)
    encode = connection.get_encoder().encode
    return [word for arguments, _ in pipe.command_stack for word in (len(arguments), *map(encode, arguments))]
