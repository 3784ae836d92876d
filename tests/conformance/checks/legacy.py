"""Legacy completions."""

from __future__ import annotations

from typing import Any

from tests.conformance.checks import answers
from tests.conformance.probes import biased, letters
from tests.conformance.server import LEGACY, Server, require

_PROMPTS = ["The sea is", "One, two, three,"]


def works_or_is_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    answers.works_or_is_refused(server, fields, param, LEGACY)


def sixteen(server: Server) -> None:
    letter_id = next(iter(letters(server)))
    body = server.complete(max_tokens=None, **biased(letter_id)).json
    counted = body["usage"]["completion_tokens"]
    require(counted == 16, f"{counted} tokens were generated")


def several_prompts(server: Server) -> None:
    alone = [server.complete(prompt=prompt, max_tokens=4) for prompt in _PROMPTS]
    together = server.complete(prompt=_PROMPTS, max_tokens=4)
    for index, one in enumerate(alone):
        require(
            together.text(index) == one.text(),
            f"choice {index} is {together.text(index)!r}, not {one.text()!r}",
        )
    for name in ("prompt_tokens", "completion_tokens"):
        counts = [one.json["usage"][name] for one in alone]
        require(together.json["usage"][name] == sum(counts), f"{name} is {together.json['usage'][name]}")


def token_ids(server: Server) -> None:
    ids = [*letters(server)]
    answer = server.complete(prompt=ids, max_tokens=2)
    counted = answer.json["usage"]["prompt_tokens"]
    require(isinstance(answer.text(), str), "there is no text")
    require(counted == len(ids), f"{len(ids)} ids count as {counted} tokens")


def lists_of_token_ids(server: Server) -> None:
    ids = [*letters(server)]
    alone = [server.complete(prompt=part, max_tokens=2).text() for part in (ids[:3], ids[3:])]
    together = server.complete(prompt=[ids[:3], ids[3:]], max_tokens=2)
    require([together.text(0), together.text(1)] == alone, "the texts differ from those of separate requests")


def prompts_times_n(server: Server) -> None:
    answer = server.complete(prompt=_PROMPTS, n=2, max_tokens=3)
    indices = [choice["index"] for choice in answer.json["choices"]]
    require(sorted(indices) == [0, 1, 2, 3], f"the indices are {indices}")
    alone = [server.complete(prompt=prompt, max_tokens=3).text() for prompt in _PROMPTS]
    texts = [answer.text(index) for index in range(4)]
    require(texts == [alone[0], alone[0], alone[1], alone[1]], f"the texts are {texts}")


def best_of(server: Server) -> None:
    """best_of returns the choice with the highest mean logprob of those that the same seed gives with n."""
    asked = {"max_tokens": 4, "temperature": 2, "seed": 9, "logprobs": 0} | biased(*letters(server))
    three = server.complete(n=3, **asked)
    means = {}
    for index in range(3):
        chosen = three.choice(index)["logprobs"]["token_logprobs"]
        means[three.text(index)] = sum(chosen) / len(chosen)
    answer = server.complete(best_of=3, n=1, **asked)
    require(len(answer.json["choices"]) == 1, "there is more than one choice")
    require(answer.text() in means, "it is not one of the three choices that n: 3 gives")
    require(means[answer.text()] >= max(means.values()) - 1e-4, "one of the three has a higher mean logprob")


def best_of_counts(server: Server) -> None:
    asked = {"max_tokens": 3, "temperature": 2, "seed": 9} | biased(*letters(server))
    body = server.complete(best_of=3, n=2, **asked).json
    require(sorted(choice["index"] for choice in body["choices"]) == [0, 1], "there are not two choices")
    counted = body["usage"]["completion_tokens"]
    require(counted == 9, f"3 times 3 tokens count as {counted}")


def echo(server: Server) -> None:
    prompt = _PROMPTS[0]
    plain, echoed = (server.complete(prompt=prompt, max_tokens=4, echo=echo) for echo in (False, True))
    require(echoed.text() == prompt + plain.text(), f"the text is {echoed.text()[:40]!r}")


def echo_alone(server: Server) -> None:
    answer = server.complete(prompt=_PROMPTS[0], max_tokens=0, echo=True)
    counted = answer.json["usage"]["completion_tokens"]
    require(answer.text() == _PROMPTS[0], f"the text is {answer.text()[:40]!r}")
    require(counted == 0, f"{counted} tokens were counted")


def echo_logprobs(server: Server, max_tokens: int) -> None:
    answer = server.complete(prompt=_PROMPTS[0], max_tokens=max_tokens, echo=True, logprobs=1)
    found = answer.choice()["logprobs"]
    require(found is not None, "there are no logprobs")
    tokens, scores = found["tokens"], found["token_logprobs"]
    usage = answer.json["usage"]
    require(len(tokens) == usage["prompt_tokens"] + max_tokens, f"there are {len(tokens)} tokens")
    require("".join(tokens) == answer.text(), "the concatenated tokens differ from the text")
    require(scores[0] is None, f"the first is {scores[0]}, not null")
    require(
        all(isinstance(score, float | int) and score <= 0 for score in scores[1:]), "others are no logprobs"
    )


def stream(server: Server) -> None:
    answer = server.complete(max_tokens=5, stream=True)
    chunks = answer.chunks
    require({chunk["object"] for chunk in chunks} == {"text_completion"}, "chunks have another object type")
    ids = {chunk["id"] for chunk in chunks}
    require(len(ids) == 1 and ids.pop().startswith("cmpl-"), "they do not share one id, cmpl-…")
    require(
        answer.frames[-1] == "[DONE]" and answer.frames.count("[DONE]") == 1,
        "[DONE] does not come exactly once, at the end",
    )
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    require(reasons[-1] is not None and set(reasons[:-1]) <= {None}, f"finish_reason: {reasons}")
