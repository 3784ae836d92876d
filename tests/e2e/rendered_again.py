"""`python -m tests.e2e.rendered_again REDIS_URL JOB_ID`: an answer's bytes, rendered only from its jobs' data in Redis.

Runs in a process of its own, which has nothing but the request's first job, the journals of its jobs and the code.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from api.generation.front_end import AnswerEvent
from api.generation.request import answer_record
from api.protocols import FRONT_ENDS
from common import connections, names
from common.errors import RequestError
from common.protocol import Failed, Finished, decode_event
from common.rq import JsonJob


def rendered_again(redis_url: str, job_id: str) -> bytes:
    """The body of the response; the choices of a stream come one after another."""
    with connections.connect(redis_url) as client:
        record = answer_record(JsonJob.fetch(job_id, connection=client).request())
        journals: list[Any] = [client.xrange(names.journal(each)) for each in record.job_ids]
    by_name = {front_end.name: front_end for front_end in FRONT_ENDS.values()}
    rendering = by_name[record.front_end].rendering(record)
    choices = [[decode_event(fields[b"d"]) for _, fields in entries] for entries in journals]
    ends = [events[-1] for events in choices]
    rendered = [
        [cast("AnswerEvent", event) for event in events if not isinstance(event, Failed)]
        for events in choices
    ]
    if not record.stream:
        for index, events in enumerate(rendered):
            rendering.add(index, events)
        return rendering.body(cast("list[Finished]", ends))
    frames = [rendering.opening(), *(rendering.frames(i, events) for i, events in enumerate(rendered))]
    failed = next((end for end in ends if isinstance(end, Failed)), None)
    if failed is None:
        frames.append(rendering.closing(cast("list[Finished]", ends)))
    else:
        error = RequestError(failed.message, status=failed.status, type=failed.kind, code=failed.code)
        frames.append(rendering.error(error))
    return b"".join(frames)


if __name__ == "__main__":
    sys.stdout.buffer.write(rendered_again(*sys.argv[1:]))
