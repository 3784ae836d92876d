"""The device sampler chooses the tokens that NumPy chooses, and reports the same log-probabilities: any mixture, while sequences join and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from common.protocol import SamplingParams
from worker.mlx.decoding.decode_batch import BatchSequence
from worker.mlx.sampling.choose import PlanKey, make_choose
from worker.mlx.sampling.chosen import ChosenRow, ChosenTokens, PreviousTokens, StepSampler
from worker.mlx.sampling.device_sampler import DeviceSampler
from worker.mlx.sampling.host_sampler import HostSampler, logits_processors
from worker.sampling.arrays import apply_mask
from worker.sampling.masks import fill_mask
from worker.sampling.sampler import BatchSampler
from worker.sampling.scores import Score
from worker.sampling.sequence_sampler import SequenceSampler

EOS = (3, 35)
XTC_SPECIAL = (1, 2)
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "drawn": SamplingParams(temperature=1.0),
    "top_p": SamplingParams(temperature=0.7, top_p=0.8),
    "top_k": SamplingParams(temperature=1.2, top_k=7, min_p=0.01),
    "top_p 0": SamplingParams(temperature=1.0, top_p=0.0),
    "top_k 1": SamplingParams(temperature=0.8, top_k=1),
    "huge top_k": SamplingParams(temperature=1.0, top_k=10**12),
    "XTC": SamplingParams(temperature=1.0, xtc_probability=0.7, xtc_threshold=0.02),
    "XTC and top_p": SamplingParams(temperature=1.3, xtc_probability=0.4, xtc_threshold=0.1, top_p=0.95),
    "greedy XTC": SamplingParams(temperature=0, xtc_probability=1.0, xtc_threshold=0.001, top_p=0.9),
    "bias": SamplingParams(temperature=0, logit_bias={3: 5.0, 5: -100.0}),
    "penalties": SamplingParams(temperature=1.0, frequency_penalty=1.0, presence_penalty=-0.5),
    "greedy penalties": SamplingParams(temperature=0, frequency_penalty=0.7, presence_penalty=1.5),
    "repetition": SamplingParams(temperature=0, repetition_penalty=1.7, repetition_context_size=5),
    "long repetition": SamplingParams(
        temperature=0.9, repetition_penalty=0.8, repetition_context_size=2**31 - 1
    ),
    "unlimited repetition": SamplingParams(
        temperature=0, repetition_penalty=1.7, repetition_context_size=2**31 - 1
    ),
    "min_tokens": SamplingParams(temperature=0.8, min_tokens=6, stop_token_ids=[9]),
    "all": SamplingParams(
        temperature=0.9,
        top_p=0.9,
        top_k=200,
        min_p=0.001,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        logit_bias={7: 1.0, 8: -2.0},
        min_tokens=4,
    ),
}


class Thirds:
    """A matcher that allows every third token in three of four positions, and any token in the fourth."""

    def __init__(self, vocab_size: int) -> None:
        self.seen: list[int] = []
        self._vocab_size = vocab_size

    @property
    def is_open(self) -> bool:
        return len(self.seen) % 4 == 3

    def advance(self, token_id: int) -> None:
        assert self.is_open or token_id % 3 == 0
        self.seen.append(token_id)

    def fill(self, words: Any) -> None:
        bits = np.zeros(32 * len(words), dtype=np.uint8)
        bits[: self._vocab_size : 1 if self.is_open else 3] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.uint32)


class Run:
    """Sequences in a batch whose logits are random; their tokens are read one step later, as in `DecodeBatch`."""

    def __init__(self, sampler: StepSampler, vocab_size: int) -> None:
        self.sampler = sampler
        self.vocab_size = vocab_size
        self.sequences: list[BatchSequence] = []
        self.rows: list[ChosenRow | None] = []
        self.inputs: list[int] = []

    def join(self, number: int, kind: str, *, num_replayed: int, num_top: int | None, held: bool) -> None:
        prompt = [(7 * number + 3 * i) % self.vocab_size for i in range(1 + number % 9)]
        replay = [3 * ((5 * number + 2 * i) % (self.vocab_size // 3)) for i in range(num_replayed)]
        params = msgspec.structs.replace(KINDS[kind], seed=(1 << 63) + 11 * number)
        matcher = Thirds(self.vocab_size) if held else None
        sampler = SequenceSampler(params, len(replay), matcher=matcher, num_top_logprobs=num_top)
        sampler.observe(replay)
        tokens = prompt + replay
        sequence = BatchSequence(
            str(number), tokens, 99, sampler, logits_processors(params, sampler), len(tokens) - 1
        )
        self.sequences.append(sequence)
        self.rows.append(None)
        self.inputs.append(tokens[-1])

    def keep(self, order: Sequence[int]) -> None:
        self.sequences = [self.sequences[index] for index in order]
        self.rows = [self.rows[index] for index in order]
        self.inputs = [self.inputs[index] for index in order]

    def step(self, logits: Any) -> ChosenTokens:
        """The tokens of the next step; it is not said yet which ones the sequences continue with."""
        previous = PreviousTokens([each.sampler for each in self.sequences], self.rows)
        chosen = self.sampler.choose(
            self.sequences, mx.array(self.inputs, mx.uint32), mx.array(logits), previous
        )
        for sequence, token in zip(self.sequences, previous.read(), strict=True):
            sequence.num_cached += 1
            if token is not None:
                sequence.token_ids.append(token[0])
        return chosen

    def continue_with(self, token_ids: list[int]) -> None:
        tokens = ChosenTokens(mx.array(token_ids, mx.uint32), lambda: [(each, None) for each in token_ids])
        self.rows = [(tokens, index) for index in range(len(token_ids))]
        self.inputs = list(token_ids)


def device_run(vocab_size: int, *, compile_after: int | None = None) -> Run:
    sampler = DeviceSampler(
        vocab_size, xtc_special_token_ids=XTC_SPECIAL, eos_token_ids=EOS, compile_after=compile_after
    )
    return Run(sampler, vocab_size)


def host_run(vocab_size: int) -> Run:
    sampler = BatchSampler(xtc_special_token_ids=XTC_SPECIAL, eos_token_ids=EOS)
    return Run(HostSampler(sampler), vocab_size)


def ids(chosen: ChosenTokens) -> list[int]:
    return [token_id for token_id, _ in chosen.read()]


def assert_same_scores(ours: Score | None, theirs: Score | None) -> None:
    """Up to rounding, which may swap tokens that are equally likely."""
    if ours is None or theirs is None:
        assert ours is theirs
        return
    assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-5, abs=1e-4)
    assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, rel=1e-5, abs=1e-4)
    if len({round(logprob, 3) for logprob in theirs.top_logprobs}) == len(theirs.top_logprobs):
        assert ours.top_ids[:-1] == theirs.top_ids[:-1]


def compare(
    device: Run, seed: int, kinds: Sequence[str], num_steps: int, *, held: bool, reporting: bool
) -> None:
    """Both run the same steps; sequences join, leave and change their rows."""
    host, random = host_run(device.vocab_size), np.random.default_rng(seed)
    number = num_differing = num_all = 0
    for step in range(num_steps):
        for _ in range(len(kinds) if step == 0 else int(random.integers(0, 3))):
            options = {
                "num_replayed": int(random.integers(0, 4)) if random.random() < 0.3 else 0,
                "num_top": int(random.choice([0, 1, 3, 20])) if reporting and random.random() < 0.5 else None,
                "held": held and random.random() < 0.3,
            }
            for run in (device, host):
                run.join(number, kinds[number % len(kinds)], **options)  # type: ignore[arg-type]
            number += 1
        logits = random.normal(0, 3, (len(host.sequences), device.vocab_size)).astype(np.float32)
        ours, theirs = device.step(logits), host.step(logits)
        # A draw on the border between two tokens may be rounded to either; both continue with the same one.
        for (mine, our_score), (other, their_score) in zip(ours.read(), theirs.read(), strict=True):
            num_all += 1
            if mine == other:
                assert_same_scores(our_score, their_score)
            else:
                num_differing += 1
        token_ids = ids(theirs)
        order = [int(i) for i in random.permutation(len(token_ids)) if random.random() < 0.9] or [0]
        for run in (device, host):
            run.continue_with(token_ids)
            if step % 3 == 2:
                run.keep(order)
    assert num_all > num_steps
    assert num_differing <= 1 + num_all // 500
    assert all(each.sampler.error is None for each in [*device.sequences, *host.sequences])


@pytest.mark.parametrize("vocab_size", [3001, 4096, 40])
def test_all_kinds_in_one_batch(vocab_size: int) -> None:
    """Over many steps, with grammars, log-probabilities and takeovers; a vocabulary of any size."""
    compare(device_run(vocab_size), 5, list(KINDS), 24, held=True, reporting=True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_alone(kind: str) -> None:
    """A batch in which no other kind's operations are needed, without and with greedy sequences."""
    compare(device_run(1024), 6, [kind], 6, held=False, reporting=False)
    compare(device_run(1024), 7, [kind, "greedy"], 8, held=False, reporting=True)


def test_greedy_sequences_have_no_filters() -> None:
    """Next to sequences with filters, XTC does not exclude a greedy sequence's most likely token."""
    kinds = ["greedy XTC", "XTC", "top_p", "greedy XTC"]
    compare(device_run(512), 8, kinds, 6, held=False, reporting=False)


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture(seed: int) -> None:
    """Some kinds, chosen at random."""
    kinds = [str(each) for each in np.random.default_rng(seed).choice(list(KINDS), 4)]
    compare(device_run(2048), seed, kinds, 12, held=seed % 2 == 0, reporting=seed % 3 == 0)


def test_a_long_window_grows() -> None:
    """A window of all tokens is as long as the sequence becomes, also beyond the room that it had at first."""
    run = device_run(512)
    run.join(8, "unlimited repetition", num_replayed=0, num_top=None, held=False)
    for step in range(150):
        logits = np.zeros((1, 512), np.float32)
        logits[0, 300 + step] = 9.0
        assert ids(run.step(logits)) == [300 + step]
        run.continue_with([300 + step])
    logits = np.zeros((1, 512), np.float32)
    logits[0, [300, 7]] = (3.0, 2.9)
    assert ids(run.step(logits)) == [7]


def test_spare_rows_change_nothing() -> None:
    """A step of more rows than sequences chooses the same tokens for the sequences, and some token in the others."""
    random = np.random.default_rng(9)
    exact, padded = device_run(256), device_run(256)
    for number, kind in enumerate(KINDS):
        for run in (exact, padded):
            run.join(number, kind, num_replayed=0, num_top=2, held=False)
    num_rows = len(KINDS) + 5
    sampler: Any = padded.sampler
    for _ in range(5):
        logits = random.normal(0, 3, (num_rows, 256)).astype(np.float32)
        wanted = ids(exact.step(logits[: len(KINDS)]))
        plan = sampler.plan(padded.sequences, num_rows)
        inputs = mx.array([*padded.inputs, 0, 0, 0, 0, 0], mx.uint32)
        chosen = sampler.record(
            plan, *sampler.function(plan.key)(mx.array(logits), inputs, plan.state, plan.constants)
        )
        found = chosen.read()
        assert [token_id for token_id, _ in found[: len(KINDS)]] == wanted
        assert all(score is not None for _, score in found[: len(KINDS)])
        assert all(score is None and 0 <= token_id < 256 for token_id, score in found[len(KINDS) :])
        for run in (exact, padded):
            for sequence in run.sequences:
                sequence.num_cached += run is padded
            run.continue_with(wanted)
        for sequence, token_id in zip(padded.sequences, wanted, strict=True):
            sequence.token_ids.append(token_id)


def test_only_what_is_needed() -> None:
    """A plan's key names the operations that some sequence needs; while the sequences stay, the plan does too."""
    run = device_run(256)
    sampler: Any = run.sampler
    run.join(0, "greedy", num_replayed=0, num_top=None, held=False)
    greedy = sampler.plan(run.sequences)
    assert greedy.key == PlanKey(1)
    assert (greedy.state, greedy.constants) == ({}, {})
    assert sampler.plan(run.sequences) is greedy
    run.join(1, "drawn", num_replayed=0, num_top=None, held=False)
    assert sampler.plan(run.sequences).key == PlanKey(2, is_drawn=True)
    run.join(2, "penalties", num_replayed=0, num_top=3, held=False)
    assert sampler.plan(run.sequences).key == PlanKey(3, is_drawn=True, is_penalized=True, num_top=5)
    run.keep([0])
    assert sampler.plan(run.sequences).key == PlanKey(1)


def test_compiled() -> None:
    """The same tokens."""
    compare(device_run(256, compile_after=0), 2, ["greedy", "all", "XTC"], 3, held=False, reporting=True)


def test_only_what_is_used_often_is_compiled() -> None:
    """A function is compiled once, after so many uses, and dropped when others were used more recently."""
    sampler = DeviceSampler(256, compile_after=2)
    key = PlanKey(1, is_drawn=True)
    first, second, third = (sampler.function(key) for _ in range(3))
    assert first is second
    assert third is not first
    assert sampler.function(key) is third
    for num_rows in range(2, 100):
        sampler.function(PlanKey(num_rows))
    assert sampler.function(key) is not third
    never = DeviceSampler(256, compile_after=None)
    assert len({id(never.function(key)) for _ in range(99)}) == 1
    assert len({id(sampler.function(PlanKey(200))) for _ in range(9)}) == 1  # greedy: one operation


class Broken(Thirds):
    def fill(self, words: Any) -> None:
        if self.seen:
            raise ValueError("no mask")
        super().fill(words)


def test_a_matcher_that_raises_fails_its_sequence_alone() -> None:
    """Its sampler keeps the error; the other sequences choose what they choose without it."""
    random = np.random.default_rng(4)
    both, alone = device_run(300), device_run(300)
    for run in (both, alone):
        run.join(1, "drawn", num_replayed=0, num_top=None, held=True)
    both.join(2, "drawn", num_replayed=0, num_top=None, held=False)
    broken = both.sequences[1].sampler
    both.sequences[1].sampler = SequenceSampler(broken.sampling, matcher=Broken(300))
    for _ in range(4):
        logits = random.normal(0, 3, (2, 300)).astype(np.float32)
        together = ids(both.step(logits))
        single = ids(alone.step(logits[:1]))
        assert together[:1] == single
        both.continue_with(together)
        alone.continue_with(single)
    assert isinstance(both.sequences[1].sampler.error, ValueError)
    assert both.sequences[0].sampler.error is None


@pytest.mark.parametrize("num_free", [0, 1, 5])
def test_masks_of_constrained_rows(num_free: int) -> None:
    """One for each row that a matcher restricts, the last one for all free rows; a row becomes free when its matcher is open."""
    run = device_run(70)
    for number in range(num_free):
        run.join(number, "greedy", num_replayed=0, num_top=None, held=False)
    for number in (8, 9):
        run.join(number, "greedy", num_replayed=0, num_top=None, held=True)
    first, second = (each.sampler for each in run.sequences[-2:])
    plan: Any = run.sampler.plan(run.sequences)  # type: ignore[attr-defined]
    assert plan.has_matchers
    expected = np.zeros(3, np.uint32)
    fill_mask(first, expected, EOS)
    everything = [0xFFFFFFFF] * 3

    def by_row() -> list[list[int]]:
        words = np.array(plan.masks()["masks"])
        assert len(words) == plan.masked_key.num_masks == min(4, num_free + 2)
        rows = plan.constants.get("mask_rows", mx.arange(num_free + 2)).tolist()
        return [words[row].tolist() for row in rows]

    assert by_row() == [everything] * num_free + [expected.tolist()] * 2
    for _ in range(3):
        second.observe([0])
    assert by_row() == [everything] * num_free + [expected.tolist(), everything]
    for _ in range(3):
        first.observe([0])
    assert plan.masks() == {}


@pytest.mark.parametrize("vocab_size", [4096, 4097, 40])
def test_random_masks(vocab_size: int) -> None:
    """Of the tokens that a mask allows the most likely is chosen, also if the vocabulary is not a multiple of 32."""
    generator = np.random.default_rng(1)
    words = generator.integers(0, 2**32, (3, -(-vocab_size // 32)), np.uint32)
    logits = generator.standard_normal((3, vocab_size), np.float32)
    choose = make_choose(PlanKey(3, num_masks=3))
    constants = {"masks": mx.array(words), "mask_shifts": mx.arange(32, dtype=mx.uint32)}
    token_ids, _, _ = choose(mx.array(logits), mx.zeros(3, mx.uint32), {}, constants)
    assert token_ids.tolist() == apply_mask(words, logits).argmax(axis=-1).tolist()
