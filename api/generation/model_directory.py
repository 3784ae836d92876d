"""Which models can be used now, from the cards of live workers.

Cached, renewed about every second in the background and at once when a model is asked for that is not there. Read by the
resources; knows nothing of queues or of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import msgspec
import redis
from rq.defaults import RQ_KEY_PREFIX

from api.generation.command_batch import CommandBatch
from api.http import errors
from common import names
from common.errors import RequestError, invalid, unavailable
from common.protocol import ModelCard

log = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
RETRY_AFTER_SECONDS = 5.0
"""A worker needs about this long to start."""


MAX_SHOWN = 200
"""Characters of a name that an error repeats."""

DEFAULT_MODEL = "default_model"
"""How mlx_lm.server's clients ask for the model that is there."""


class ServedModel(msgspec.Struct, frozen=True):
    """A model with at least one live worker.

    Attributes:
        created: Unix seconds when its first worker loaded it.
        context_length: In tokens; the least of its workers'.
        vocab_size: Token ids are below it; the least of its workers'.
        num_workers: Live ones.
        tokens_per_second: Of all of them, while they were busy lately; 0: not known.
        mean_tokens: Of their answers lately; 0: not known.
        can_fill: Whether each of them fills a gap before a suffix.
    """

    id: str
    created: int
    context_length: int
    vocab_size: int
    num_workers: int
    free_slots: int
    quantization: str
    tokens_per_second: float = 0.0
    mean_tokens: float = 0.0
    can_fill: bool = False

    def seconds_for(self, num_requests: int) -> float | None:
        """How long its workers take to answer so many requests like those before; None: not known."""
        if not (self.tokens_per_second and self.mean_tokens):
            return None
        return num_requests * self.mean_tokens / self.tokens_per_second


class ModelDirectory:
    """See the module.

    Attributes:
        is_suspended: Whether `rq suspend` was in force a moment ago: requests wait.

    Args:
        default_model: For requests that name none; None: the only one served.
    """

    def __init__(self, reads: CommandBatch, default_model: str | None) -> None:
        self.is_suspended = False
        self._reads = reads
        self._default_model = default_model
        self._served: Mapping[str, ServedModel] = {}
        self._known: frozenset[str] = frozenset()
        self._read_at = -math.inf
        self._refresh: asyncio.Task[None] | None = None
        self._background: asyncio.Task[None] | None = None
        self._bad_cards: set[str] = set()  # of the live ones, those whose warning is logged

    async def start(self) -> None:
        """Read the cards now and from now on."""
        self._background = asyncio.create_task(self._keep_fresh())
        await self._refresh_once()

    async def stop(self) -> None:
        """Read no more."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)

    @property
    def is_fresh(self) -> bool:
        """Whether Redis has answered lately."""
        return time.monotonic() - self._read_at < names.CARD_SECONDS

    @property
    def served(self) -> list[ServedModel]:
        """The models that can be used now, by name; as of a moment ago."""
        return sorted(self._served.values(), key=lambda model: model.id) if self.is_fresh else []

    def current(self) -> list[ServedModel]:
        """As `served`.

        Raises:
            RequestError: 503; Redis is away.
        """
        self._check_fresh()
        return self.served

    async def resolve(self, name: str | None) -> ServedModel:
        """The model that a request means.

        Raises:
            RequestError: 400, it names none and there is no default; 404, nobody knows the model; 503, it has no worker
                now or Redis is away.
        """
        if name is None or (name == DEFAULT_MODEL and name not in self._served):
            if self._default_model is None:
                return await self._only_one()
            name = self._default_model
        self._check_fresh()
        if name not in self._served:
            await self._refresh_once()
        served = self._served.get(name)
        if served is not None:
            return served
        if name in self._known or name == self._default_model:
            raise unavailable(
                f"No worker serves the model `{name}` at the moment.",
                RETRY_AFTER_SECONDS,
                code="model_unavailable",
            )
        raise RequestError(
            f"The model `{name[:MAX_SHOWN]}` does not exist.",
            status=404,
            param="model",
            code="model_not_found",
        )

    async def _only_one(self) -> ServedModel:
        served = self.current()
        if not served:
            await self._refresh_once()
            served = self.served
        if len(served) == 1:
            return served[0]
        if not served and self._known:
            raise unavailable(
                "No worker serves a model at the moment.", RETRY_AFTER_SECONDS, code="model_unavailable"
            )
        listed = ", ".join(model.id for model in served) or "none at the moment"
        raise invalid(f"Say which model to use; served are: {listed}.", "model")

    def _check_fresh(self) -> None:
        # Redis is not asked here: a request that waits for a server that is away would wait as long as a connection does.
        if not self.is_fresh:
            raise errors.queue_unavailable()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self._refresh_once()
            except Exception:
                log.exception("the model cards could not be read")

    async def _refresh_once(self) -> None:
        """Read all cards; whoever asks meanwhile waits for the same answer. Without Redis, all stays as it was."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._read())
        await asyncio.shield(self._refresh)

    async def _read(self) -> None:
        try:
            await self._read_cards()
        except (redis.RedisError, OSError) as error:
            log.debug("the model cards cannot be read: %s", error)  # said by the relay

    async def _read_cards(self) -> None:
        since = time.time() - names.CARD_NAME_SECONDS
        workers, known, suspended = await self._reads.execute(
            [
                ("ZRANGEBYSCORE", names.WORKER_CARDS, since, "+inf"),
                ("ZRANGE", names.KNOWN_MODELS, 0, -1),
                ("EXISTS", f"{RQ_KEY_PREFIX}:suspended"),
            ]
        )
        listed = [worker.decode(errors="replace") for worker in workers]
        self._bad_cards.intersection_update(listed)
        commands = [("HGETALL", names.worker_card(worker)) for worker in listed]
        hashes = await self._reads.execute_each(commands) if commands else []
        by_model: dict[str, list[ModelCard]] = defaultdict(list)
        for worker, fields in zip(listed, hashes, strict=True):
            card = self._card(worker, fields) if fields else None
            if card is not None:
                by_model[card.id].append(card)
        self._served = {model: _merge(cards) for model, cards in by_model.items()}
        self.is_suspended = bool(suspended)
        self._known = frozenset(name.decode(errors="replace") for name in known)
        self._read_at = time.monotonic()

    def _card(self, worker: str, fields: Any) -> ModelCard | None:
        """A card; None for one that cannot be read, which is no other card's fault."""
        try:
            if isinstance(fields, Exception):
                raise fields
            return ModelCard.from_hash(fields)
        except (msgspec.ValidationError, UnicodeDecodeError, redis.ResponseError) as error:
            if worker not in self._bad_cards:
                self._bad_cards.add(worker)
                log.warning("the card of worker %s cannot be read: %s", worker, error)
            return None


def _merge(cards: list[ModelCard]) -> ServedModel:
    means = [card.mean_tokens for card in cards if card.mean_tokens]
    return ServedModel(
        id=cards[0].id,
        created=min(card.created for card in cards),
        context_length=min(card.context_length for card in cards),
        vocab_size=min(card.vocab_size for card in cards),
        num_workers=len(cards),
        free_slots=sum(card.free_slots for card in cards),
        quantization=cards[0].quantization,
        tokens_per_second=sum(card.tokens_per_second for card in cards),
        can_fill=all(card.can_fill for card in cards),
        mean_tokens=statistics.fmean(means) if means else 0.0,
    )
