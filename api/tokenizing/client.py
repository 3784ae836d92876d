"""Asks the workers of a model for tokens through Redis, and waits for the replies.

A request is an id on the model's list and a value that expires; replies arrive on one list of this API process, which one task
reads while a request waits. Asking again is safe, since a reply depends on the request alone: that covers a worker that died or
sleeps. Created by `api.app`. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Any

import msgspec
import redis
import redis.asyncio

from api.generation.command_batch import CommandBatch, queue_unavailable
from api.generation.request import Prompt
from api.generation.served_model import ServedModel
from api.tokenizing.counting import TokenizedPrompt
from common import names
from common.errors import RequestError, unavailable
from common.protocol import (
    TokenizeReply,
    TokenizeRequest,
    TokenPrompt,
    ToolUse,
    decode_tokenize_reply,
    encode,
)

log = logging.getLogger(__name__)

MAX_WAITING = 256
"""Requests on a model's list."""

MAX_WAITING_BYTES = 64 * 2**20
"""Of these requests together; an empty list takes a request of any size."""

WAIT_SECONDS = (2.0, 8.0, names.TOKENIZE_SECONDS - 10.0)
"""How long each attempt waits for a reply. The first is short: most often a worker died, or a sleeping one has the request."""

_BLOCK_SECONDS = 1
_RETRY_SECONDS = 0.25

# KEYS: the model's list, the request. ARGV: the request's id, its value, time to live in seconds, the maximum of requests and of
# bytes. An id ends with the size of its request. A request that still waits is not listed twice. Reply: whether it is listed.
_SUBMIT = """
if not redis.call('LPOS', KEYS[1], ARGV[1]) then
  local ids, num_bytes = redis.call('LRANGE', KEYS[1], 0, -1), #ARGV[2]
  for _, id in ipairs(ids) do num_bytes = num_bytes + (tonumber(string.sub(id, -8), 16) or 0) end
  if #ids >= tonumber(ARGV[4]) or (#ids > 0 and num_bytes > tonumber(ARGV[5])) then return 0 end
  redis.call('RPUSH', KEYS[1], ARGV[1])
end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""


class TokenizeClient:
    """See the module, and `api.tokenizing.counting.Tokenizing`.

    Args:
        client: For the task that reads replies.
        commands: For all other commands.
        wait_seconds: See `WAIT_SECONDS`.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        commands: CommandBatch,
        wait_seconds: tuple[float, ...] = WAIT_SECONDS,
    ) -> None:
        self._client = client
        self._commands = commands
        self._wait_seconds = wait_seconds
        self._process_id = ""  # set by the first request, after the fork
        self._waiting: dict[str, asyncio.Future[TokenizeReply]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Stop reading replies."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def count(
        self,
        model: ServedModel,
        prompt: Prompt,
        *,
        tool_use: ToolUse | None = None,
        grammar: str | None = None,
        adds_special_tokens: bool = True,
        returns_tokens: bool = False,
        returns_strings: bool = False,
    ) -> TokenizedPrompt:
        reply = await self._ask(
            model,
            prompt=prompt,
            tool_use=tool_use,
            grammar=grammar,
            adds_special_tokens=adds_special_tokens,
            returns_tokens=returns_tokens,
            returns_strings=returns_strings,
        )
        return TokenizedPrompt(
            count=reply.count, token_ids=reply.token_ids, token_strings=reply.token_strings
        )

    async def text(self, model: ServedModel, token_ids: list[int]) -> str:
        return (await self._ask(model, prompt=TokenPrompt(token_ids), returns_text=True)).text

    async def _ask(self, model: ServedModel, **fields: Any) -> TokenizeReply:
        if not model.can_tokenize:
            raise unavailable(
                f"The workers of the model `{model.id}` are older than this server and cannot tokenize for clients.",
                code="tokenizing_unavailable",
            )
        self._process_id = self._process_id or secrets.token_hex(8)
        request = TokenizeRequest(request_id="0" * 32, process_id=self._process_id, **fields)
        request_id = f"{secrets.token_hex(12)}{len(encode(request)):08x}"
        request = msgspec.structs.replace(request, request_id=request_id)
        reply: asyncio.Future[TokenizeReply] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = reply
        try:
            return _checked(await self._reply_to(request, encode(request), model, reply))
        finally:
            del self._waiting[request_id]

    async def _reply_to(
        self, request: TokenizeRequest, data: bytes, model: ServedModel, reply: asyncio.Future[TokenizeReply]
    ) -> TokenizeReply:
        for wait_seconds in self._wait_seconds:
            await self._submit(request.request_id, data, model.id)
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read_replies())
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(asyncio.shield(reply), wait_seconds)
        with contextlib.suppress(redis.RedisError, OSError):
            await self._commands.execute([("DEL", names.tokenize_request(request.request_id))])
        raise unavailable(
            f"No worker of the model `{model.id}` has tokenized the prompt in time.",
            code="tokenizing_timeout",
        )

    async def _submit(self, request_id: str, data: bytes, model_id: str) -> None:
        keys = (names.tokenize_queue(model_id), names.tokenize_request(request_id))
        arguments = (request_id, data, names.TOKENIZE_SECONDS, MAX_WAITING, MAX_WAITING_BYTES)
        try:
            [is_listed] = await self._commands.execute([("EVAL", _SUBMIT, len(keys), *keys, *arguments)])
        except (redis.RedisError, OSError) as error:
            log.warning("a request for tokens cannot be sent: %s", error)
            raise queue_unavailable() from error
        if not is_listed:
            raise unavailable(
                f"Too many requests for tokens wait for the model `{model_id}`.", code="tokenizing_busy"
            )

    async def _read_replies(self) -> None:
        """Pass replies on while a request waits; blocks on a connection of its own."""
        key = names.tokenized(self._process_id)
        while self._waiting:
            try:
                taken: Any = await self._client.blpop([key], _BLOCK_SECONDS)
            except (redis.RedisError, OSError) as error:
                log.debug("replies with tokens cannot be read: %s", error)  # the relay logs it once
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if taken is not None:
                self._deliver(taken[1])

    def _deliver(self, data: bytes) -> None:
        try:
            reply = decode_tokenize_reply(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("a reply with tokens cannot be read: %s", error)
            return
        waiting = self._waiting.get(reply.request_id)
        if waiting is not None and not waiting.done():  # else the reply to an earlier attempt
            waiting.set_result(reply)


def _checked(reply: TokenizeReply) -> TokenizeReply:
    """The reply itself.

    Raises:
        RequestError: The worker replied with an error.
    """
    if (error := reply.error) is None:
        return reply
    raise RequestError(
        error.message, status=error.status, type=error.kind, param=error.param, code=error.code
    )
