"""What `POST /v1/completions` accepts and refuses, without a server."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from api.generation import request as generation_request
from api.generation.request import GenerationRequest
from api.generation.served_model import ServedModel
from api.openai.completions import request as completion_request
from api.openai.fields.body import check_token_ids
from common.errors import RequestError
from common.protocol import SamplingParams, TextPrompt, TokenPrompt

MODEL = ServedModel(
    id="m", created=1, context_length=100, vocab_size=50, num_workers=1, free_slots=1, quantization=""
)


def parse(**fields: Any) -> GenerationRequest:
    return completion_request.parse(json.dumps({"prompt": "hi"} | fields).encode())


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("hi", TextPrompt("hi")),
        ("", TextPrompt("")),
        (None, TextPrompt("")),
        (["hi"], TextPrompt("hi")),
        ([""], TextPrompt("")),
        ([1, 2, 3], TokenPrompt([1, 2, 3])),
        ([[1, 2, 3]], TokenPrompt([1, 2, 3])),
    ],
)
def test_one_prompt_in_each_of_its_forms(prompt: Any, parsed: TextPrompt | TokenPrompt) -> None:
    """Text or token ids, alone or as the only one of a list."""
    assert parse(prompt=prompt).prompts == [parsed]


def test_several_prompts_with_choices() -> None:
    """A job for each choice of each prompt, in OpenAI's order; the first one of each draws as a single one would."""
    request = parse(prompt=["a", "b"], n=2, best_of=3, seed=7)
    jobs = request.jobs("x", MODEL, "c", [10, 20])
    assert [job.prompt for job in jobs] == [TextPrompt("a")] * 3 + [TextPrompt("b")] * 3
    assert [job.sampling.seed == 7 for job in jobs] == [True, False, False] * 2
    assert len({job.sampling.seed for job in jobs}) == 3
    assert len({job.job_id for job in jobs}) == 6
    assert {job.top_logprobs for job in jobs} == {0}  # to find the best
    assert [job.sampling for job in jobs[:3]] == [job.sampling for job in jobs[3:]]


def test_the_size_of_a_request_is_bounded() -> None:
    """Choices are bounded, and so are the copies of a prompt; the parameter that multiplies is named."""
    generation_request.check_size(parse(prompt=["a"] * 1024), 10_000)
    for fields, num_bytes, param in (
        ({"prompt": ["a"] * 1025}, 10_000, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, 10_000, "n"),
        ({"n": 128}, 2**20, "n"),
    ):
        with pytest.raises(RequestError) as raised:
            generation_request.check_size(parse(**fields), num_bytes)
        assert (raised.value.status, raised.value.param) == (400, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x" * 400_000},
        {"logit_bias": {str(10**9 + i): 1 for i in range(30_000)}},
    ],
    ids=["suffix", "logit_bias"],
)
def test_what_every_job_of_a_request_has_is_counted_for_each(fields: dict[str, Any]) -> None:
    """Many small prompts with one large field are refused as many choices of it are; a few are accepted."""
    few, many = parse(prompt=["a"] * 100, **fields), parse(prompt=["a"] * 200, **fields)
    generation_request.check_size(few, 500_000)
    with pytest.raises(RequestError, match="at most 67108864 are allowed") as raised:
        generation_request.check_size(many, 500_000)
    assert (raised.value.status, raised.value.param) == (400, "prompt")


@pytest.mark.parametrize("fields", [{"grammar": "x" * 400_000}, {"stop": ["x" * 400_000]}])
def test_other_fields_of_every_job_are_counted(fields: dict[str, Any]) -> None:
    """Also those that cannot be as long, or that completions do not have."""
    request = msgspec.structs.replace(parse(prompt=["a"] * 200), **fields)
    with pytest.raises(RequestError, match="at most 67108864 are allowed"):
        generation_request.check_size(request, 500_000)


@pytest.mark.parametrize("stop", ["x" * 1001, ["a", "x" * 1001]])
def test_the_length_of_a_stop_string_is_bounded(stop: Any) -> None:
    """A worker compares it with the text after each token."""
    assert parse(stop="x" * 1000).stop == ["x" * 1000]
    with pytest.raises(RequestError) as raised:
        parse(stop=stop)
    assert raised.value.status == 400
    assert (raised.value.param or "").startswith("stop")


def test_gaps_are_filled_by_models_that_can() -> None:
    """Other models refuse `suffix` by name."""
    request = parse(suffix="x")
    assert request.prompts == [TextPrompt("hi", "x")]
    completion_request.check_prompts(request, msgspec.structs.replace(MODEL, can_fill=True))
    with pytest.raises(RequestError) as raised:
        completion_request.check_prompts(request, MODEL)
    assert raised.value.param == "suffix"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [None]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt[0][0]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 21}, "best_of"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"echo": 0}, "echo"),
        ({"echo": True, "suffix": "x"}, "echo"),
        ({"prompt": [1], "suffix": "x"}, "suffix"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_invalid_and_unsupported_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """The legacy endpoint's own rules; those that it shares are tested with the chat's."""
    with pytest.raises(RequestError) as raised:
        parse(**fields)
    assert (raised.value.status, raised.value.param) == (400, param)


def test_defaults() -> None:
    """OpenAI's default of 16 tokens, and no log-probabilities."""
    request = parse()
    assert (request.max_tokens, request.top_logprobs, request.stream) == (16, None, False)
    assert parse(logprobs=0).top_logprobs == 0
    assert parse(max_tokens=0, echo=True).max_tokens == 0


def test_neutral_values_are_accepted() -> None:
    """Values without an effect are accepted and count as known fields."""
    assert parse(n=1, best_of=1, echo=False, suffix=None, user="u").ignored == []


@pytest.mark.parametrize("token_id", [-1, 50, 10**30])
def test_token_ids_are_inside_the_vocabulary(token_id: int) -> None:
    """Neither a prompt nor a bias may name a token that the model does not have."""
    with pytest.raises(RequestError) as raised:
        completion_request.check_prompts(parse(prompt=[0, token_id]), MODEL)
    assert (raised.value.status, raised.value.param) == (400, "prompt")
    with pytest.raises(RequestError) as raised:
        check_token_ids(SamplingParams(logit_bias={token_id: 1.0}), MODEL)
    assert (raised.value.status, raised.value.param) == (400, "logit_bias")


def test_the_last_token_id_is_accepted() -> None:
    """The largest id of the vocabulary is accepted."""
    completion_request.check_prompts(parse(prompt=[0, 49]), MODEL)
    check_token_ids(SamplingParams(logit_bias={0: 1.0, 49: 1.0}), MODEL)
