"""Non-streamed answers: checks that need several requests or a computation."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.conformance import judge
from tests.conformance.probes import biased, letters
from tests.conformance.server import CHAT, LEGACY, Server, require

_CLOCK_SECONDS = 300
_LONGEST_GUESS_TOKENS = 140_000


def created_now(server: Server, path: str) -> None:
    created = server.post(path, {}).json.get("created")
    require(type(created) is int, f"created is {created!r}")
    require(abs(created - time.time()) < _CLOCK_SECONDS, f"created is {created}, which is not now")


def usage_sums(server: Server, path: str) -> None:
    usage = server.post(path, {"max_tokens": 2}).json["usage"]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    require(all(type(usage[name]) is int for name in names), f"usage is {usage}")
    require(usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"], f"usage is {usage}")


def exactly_so_many(server: Server, path: str, param: str) -> None:
    """Counts are exact for a text of one repeated letter, which nothing stops."""
    letter_id, letter = next(iter(letters(server).items()))
    for number in (1, 2, 5):
        answer = server.post(path, {"max_tokens": None, param: number} | biased(letter_id))
        counted = answer.json["usage"]["completion_tokens"]
        require(answer.text() == letter * number, f"{param} {number} gave the text {answer.text()!r}")
        require(counted == number, f"{param} {number} counted {counted} tokens")
        require(
            answer.choice()["finish_reason"] == "length", f"it ended by {answer.choice()['finish_reason']}"
        )


def parts_equal_text(server: Server) -> None:
    def ask(content: Any) -> Any:
        return server.chat(messages=[{"role": "user", "content": content}], max_tokens=4)

    one = ask("Name three rivers.")
    parts = ask([{"type": "text", "text": "Name three "}, {"type": "text", "text": "rivers."}])
    require(one.text() == parts.text(), f"{parts.text()!r} is not {one.text()!r}")
    counted = [answer.json["usage"]["prompt_tokens"] for answer in (one, parts)]
    require(counted[0] == counted[1], f"they count {counted} tokens")


def ids_differ(server: Server, path: str) -> None:
    ids = [server.post(path, {}).json["id"] for _ in range(2)]
    require(ids[0] != ids[1], f"both have the id {ids[0]}")


def cached_equals_fresh(server: Server) -> None:
    question = [{"role": "user", "content": f"It is {time.time_ns()}. " + "Name a fish. " * 20}]
    answers = [server.chat(messages=question, max_tokens=6) for _ in range(3)]
    texts = {answer.text() for answer in answers}
    require(len(texts) == 1, f"the answers are {sorted(texts)}")
    usages = [answer.json["usage"] for answer in answers]
    require(len({usage["prompt_tokens"] for usage in usages}) == 1, "prompt_tokens change")
    for usage in usages:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        require(cached <= usage["prompt_tokens"], "more tokens are cached than there are")


def several_choices(server: Server, path: str) -> None:
    asked: dict[str, Any] = {"max_tokens": 3, "temperature": 1, "seed": 3} | biased(*letters(server))
    one, three = server.post(path, asked).json, server.post(path, asked | {"n": 3}).json
    indices = sorted(choice["index"] for choice in three["choices"])
    require(indices == [0, 1, 2], f"the indices are {indices}")
    counts = three["usage"]["completion_tokens"], three["usage"]["prompt_tokens"]
    require(counts[0] == 9, f"3 choices of 3 tokens count {counts[0]}")
    require(counts[1] == one["usage"]["prompt_tokens"], "the prompt is counted several times")


def too_long(server: Server, path: str, param: str) -> None:
    """The prompt exceeds the context length of the model's entry, or a guess if it has none."""
    entry: dict[str, Any] = next(
        (m for m in server.ask("GET", "/v1/models").json["data"] if m["id"] == server.model), {}
    )
    context_tokens = (
        entry.get("context_length")
        or entry.get("max_model_len")
        or (entry.get("meta") or {}).get("n_ctx_train")
    )
    text = "sea " * (context_tokens + 100 if isinstance(context_tokens, int) else _LONGEST_GUESS_TOKENS)
    fields = {"prompt": text} if path == LEGACY else {"messages": [{"role": "user", "content": text}]}
    judge.check_error(server.post(path, fields), 400, param=param, code="context_length_exceeded")
    judge.check_error(
        server.post(path, fields | {"stream": True}), 400, param=param, code="context_length_exceeded"
    )


def works_or_is_refused(server: Server, fields: dict[str, Any], param: str, path: str = CHAT) -> None:
    """An answer, or a 400 that names `param`."""
    answer = server.post(path, fields)
    if answer.status == 200:
        require(isinstance(answer.text(), str), "the answer has no text")
    else:
        judge.check_error(answer, 400, param=param)
    require(json.loads(server.post(path, {}).body)["choices"], "the next request is not answered")
