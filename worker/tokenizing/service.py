"""The tokenizing thread: answers tokenize requests while the generation thread decodes.

Any worker of the model takes a request from a list in Redis and appends the reply to the list of the API process that asked. A
reply depends on the request alone, so a request whose worker died is simply sent again: there is no lease and no journal.
Started by `worker.jobs.batch_worker`. Must not know RQ, slots or the generation loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import redis

from common import names
from common.errors import RequestError
from common.protocol import (
    Failed,
    TokenizeReply,
    TokenizeRequest,
    TokenPrompt,
    decode_tokenize_request,
    encode,
)
from worker.loop.engine import PromptTokenizer
from worker.loop.progress import Progress

log = logging.getLogger(__name__)

BLOCK_SECONDS = 1
"""The longest that this thread blocks on the list: Redis gives a request even to a blocked worker that sleeps."""

_RETRY_SECONDS = 0.5

_FAILED = Failed(0, "The model cannot tokenize this prompt.")


class TokenizeService:
    """See the module.

    Attributes:
        progress: The request under way, for the watchdog.

    Args:
        make_tokenizer: Called once, on this thread, for the first request.
        draining: Returns True once the thread should take no more requests and end.
    """

    def __init__(
        self,
        connection: redis.Redis,
        model: str,
        make_tokenizer: Callable[[], PromptTokenizer],
        draining: Callable[[], bool],
    ) -> None:
        self._redis = connection
        self._queue_key = names.tokenize_queue(model)
        self._make_tokenizer = make_tokenizer
        self._draining = draining
        self._tokenizer: PromptTokenizer | None = None
        self.progress = Progress("tokenizing")

    def run(self) -> None:
        """Answer requests until the worker drains."""
        while not self._draining():
            try:
                self._answer_next()
            except redis.RedisError as error:
                # DEBUG: the heartbeat already warns that Redis is unreachable.
                log.debug("cannot take tokenize requests: %s", error)
                time.sleep(_RETRY_SECONDS)
            except Exception:
                log.exception("a tokenize request could not be answered")
                time.sleep(_RETRY_SECONDS)

    def _answer_next(self) -> None:
        """Wait for a request and answer it. One that has expired, or was answered already, is skipped."""
        taken: Any = self._redis.blpop([self._queue_key], BLOCK_SECONDS)
        if taken is None:
            return
        request_id = taken[1].decode(errors="replace")
        data: Any = self._redis.get(names.tokenize_request(request_id))
        if data is None:
            return
        try:
            request = decode_tokenize_request(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("tokenize request %s cannot be decoded: %s", request_id[:64], error)
            return
        reply_key = names.tokenized(request.process_id)
        reply = encode(self._answer(request))
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.rpush(reply_key, reply)
            pipe.expire(reply_key, names.TOKENIZE_SECONDS)
            pipe.delete(names.tokenize_request(request.request_id))
            pipe.execute()

    def _answer(self, request: TokenizeRequest) -> TokenizeReply:
        """The reply; any exception becomes an error of this request alone."""
        try:
            with self.progress.on("prompt", request.request_id):
                return _tokenize(request, self._own_tokenizer())
        except RequestError as error:
            failed = Failed(0, error.message, error.status, error.type, error.param, error.code)
        except Exception:
            log.exception("tokenize request %s failed", request.request_id)
            failed = _FAILED
        return TokenizeReply(request_id=request.request_id, error=failed)

    def _own_tokenizer(self) -> PromptTokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        return self._tokenizer


def _tokenize(request: TokenizeRequest, tokenizer: PromptTokenizer) -> TokenizeReply:
    """Convert text to tokens, or tokens to text.

    Raises:
        RequestError: As `PromptTokenizer`.
    """
    if isinstance(request.prompt, TokenPrompt):
        token_ids = request.prompt.token_ids
    else:
        token_ids = tokenizer.encode(
            request.prompt,
            tool_use=request.tool_use,
            grammar=request.grammar,
            adds_special_tokens=request.adds_special_tokens,
        )
    return TokenizeReply(
        request_id=request.request_id,
        count=len(token_ids),
        token_ids=token_ids if request.returns_tokens else [],
        token_strings=tokenizer.token_strings(token_ids) if request.returns_strings else [],
        text=tokenizer.decode(token_ids) if request.returns_text else "",
    )
