"""Which models can be used now, from the cards of live workers.

Cached; refreshed every second in the background, and at once when a request names a model that is not served. Used by the
endpoints. Must not know queues or HTTP.
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

from api.generation.command_batch import CommandBatch, queue_unavailable
from api.generation.served_model import DEFAULT_NAMES, ServedModel
from common import names
from common.errors import RequestError, invalid, unavailable
from common.models import sampling_defaults
from common.models.model_aliases import ModelAliases
from common.models.model_card import ModelCard

log = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
RETRY_AFTER_SECONDS = 5.0
"""About how long a worker takes to start."""

MAX_CARDS = 1000
MAX_KNOWN_MODELS = 1000
"""So many are read from Redis, the latest ones; far more than there are Macs."""

MAX_SHOWN_CHARACTERS = 200
"""Of a model's name in an error message."""


class ModelDirectory:
    """See the module.

    Attributes:
        is_suspended: Whether `rq suspend` was in force at the last refresh: requests wait in the queue.

    Args:
        default_model: For requests that name none; None: the only one that is served.
        aliases: Other names of models.
    """

    def __init__(
        self, reads: CommandBatch, default_model: str | None, aliases: ModelAliases | None = None
    ) -> None:
        self.is_suspended = False
        self._reads = reads
        self._default_model = default_model
        self._aliases = aliases or ModelAliases()
        self._served: Mapping[str, ServedModel] = {}
        self._known: frozenset[str] = frozenset()
        self._refreshed_mono = -math.inf
        self._refresh: asyncio.Task[None] | None = None
        self._background: asyncio.Task[None] | None = None
        self._bad_cards: set[str] = set()  # listed workers whose card was warned about

    async def start(self) -> None:
        """Read the cards now, and regularly from now on."""
        self._background = asyncio.create_task(self._keep_fresh())
        await self._refresh_once()

    async def stop(self) -> None:
        """Stop reading cards."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)

    @property
    def is_fresh(self) -> bool:
        """Whether the last successful refresh is recent."""
        return time.monotonic() - self._refreshed_mono < names.CARD_SECONDS

    @property
    def served(self) -> list[ServedModel]:
        """The models that can be used, by name, as of the last refresh."""
        return sorted(self._served.values(), key=lambda model: model.id) if self.is_fresh else []

    def current(self) -> list[ServedModel]:
        """Like `served`.

        Raises:
            RequestError: 503; Redis is unavailable.
        """
        self._check_fresh()
        return self.served

    @property
    def aliases(self) -> list[tuple[str, ServedModel]]:
        """See `api.generation.served_model.ModelLookup`."""
        served = self._served if self.is_fresh else {}
        return [
            (alias, served[model])
            for alias, model in sorted(self._aliases.plain.items())
            if model in served and alias not in served
        ]

    async def resolve(self, name: str | None) -> ServedModel:
        """See `api.generation.served_model.ModelLookup`."""
        if name is None or (
            name in DEFAULT_NAMES and name not in self._served and name not in self._aliases.plain
        ):
            if self._default_model is None:
                return await self._only_one()
            name = self._default_model
        self._check_fresh()
        served = self._served.get(self._real_name(name))
        if served is None:
            await self._refresh_once()
            served = self._served.get(self._real_name(name))
        if served is not None:
            return served
        real = self._real_name(name)
        if real != name or name in self._known or name == self._default_model:
            raise unavailable(
                f"No worker serves the model `{real}` at the moment.",
                RETRY_AFTER_SECONDS,
                code="model_unavailable",
            )
        raise RequestError(
            f"The model `{name[:MAX_SHOWN_CHARACTERS]}` does not exist.",
            status=404,
            param="model",
            code="model_not_found",
        )

    def _real_name(self, name: str) -> str:
        """The model that a name stands for: itself if it is served, a plain alias, itself if it was served lately, a wildcard.

        A model whose worker restarts is not replaced by another one that a wildcard names.
        """
        if name in self._served:
            return name
        if name in self._aliases.plain:
            return self._aliases.plain[name]
        if name in self._known:
            return name
        return self._aliases.by_wildcard(name) or name

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
        raise invalid(f"`model` is required. Models that are served: {listed}.", "model")

    def _check_fresh(self) -> None:
        # Not a call to Redis: while it is unavailable, that would take as long as the connection's timeout.
        if not self.is_fresh:
            raise queue_unavailable()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self._refresh_once()
            except Exception:
                log.exception("the model cards could not be read")

    async def _refresh_once(self) -> None:
        """Read all cards; concurrent calls share one read. While Redis is unavailable, nothing changes."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._read())
        await asyncio.shield(self._refresh)

    async def _read(self) -> None:
        try:
            await self._read_cards()
        except (redis.RedisError, OSError) as error:
            log.debug("the model cards cannot be read: %s", error)  # the relay logs it once

    async def _read_cards(self) -> None:
        since = time.time() - names.CARD_NAME_SECONDS
        workers, known, suspended = await self._reads.execute(
            [
                ("ZREVRANGEBYSCORE", names.WORKER_CARDS, "+inf", since, "LIMIT", 0, MAX_CARDS),
                ("ZREVRANGE", names.KNOWN_MODELS, 0, MAX_KNOWN_MODELS - 1),
                ("EXISTS", f"{RQ_KEY_PREFIX}:suspended"),
            ]
        )
        listed = sorted(worker.decode(errors="replace") for worker in workers)
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
        self._refreshed_mono = time.monotonic()

    def _card(self, worker: str, fields: Any) -> ModelCard | None:
        """A card; None if it cannot be read, which must not affect the others."""
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
        busy_slots=sum(max(0, card.max_batch - card.free_slots) for card in cards),
        quantization=cards[0].quantization,
        tokens_per_second=sum(card.tokens_per_second for card in cards),
        can_fill=all(card.can_fill for card in cards),
        mean_tokens=statistics.fmean(means) if means else 0.0,
        sampling_defaults=dict(sampling_defaults.from_text(cards[0].sampling_defaults)),
        can_reason=all(card.can_reason for card in cards),
        can_tokenize=any(card.can_tokenize for card in cards),
    )
