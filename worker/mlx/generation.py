"""What a job needs besides its sequence in the batch: prompt, detokenizer, sampler, grammar, answer parser.

`GenerationBuilder` creates it for `worker.mlx.engine`; its `encode` is called on another thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from common.errors import invalid
from common.protocol import ChatPrompt, GenerationJob
from worker.loop.engine import InsertResult, ModelInfo
from worker.mlx.decoding.decode_batch import BatchSequence
from worker.mlx.memory.cache_memory import expected_tokens
from worker.mlx.sampling.host_sampler import logits_processors
from worker.mlx.scoring import PromptScoring
from worker.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher
from worker.sampling.sequence_sampler import Matcher, SequenceSampler
from worker.sampling.thinking import ReasoningMeter, ThinkingBudget, wrap_for_thinking
from worker.text import answer_format, answer_parser, prompts
from worker.text.detokenizer import Detokenizer, TokenBytes
from worker.text.prompt_tokenizer import OwnPromptTokenizer
from worker.text.template_defaults import with_defaults


@dataclass(slots=True, eq=False)
class Generation:
    """One job's generation.

    Attributes:
        sequence: Its state in the batch.
        tokens_without_text: Those whose text is not part of the answer.
        num_prompt_tokens: Tokens of the prompt.
        num_answer_tokens: Tokens of the answer so far, including those that other workers generated.
        max_tokens: Limit of the answer's length.
        waits_for: The sequence that is prefilling a prefix of this one; None: it need not wait.
        scoring: Of a prompt that is echoed with log-probabilities; None otherwise.
        is_echoed: Whether the prompt has been echoed, or no echo was requested.
    """

    job: GenerationJob
    sequence: BatchSequence
    detokenizer: Detokenizer
    tokens_without_text: frozenset[int]
    num_prompt_tokens: int
    num_answer_tokens: int
    max_tokens: int
    insert_result: InsertResult
    waits_for: BatchSequence | None = None
    scoring: PromptScoring | None = None
    is_echoed: bool = True

    @property
    def expected_tokens(self) -> int:
        return expected_tokens(self.num_prompt_tokens, self.num_answer_tokens, self.max_tokens)


class GenerationBuilder:
    """Creates the `Generation` of each job, with one model's tokenizer.

    Args:
        template_arguments: See `worker.text.template_defaults`.
    """

    def __init__(
        self,
        tokenizer: Any,
        token_bytes: TokenBytes,
        info: ModelInfo,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes
        self._format = answer_format.detect_format(tokenizer)
        self._template_arguments = template_arguments or {}
        self._context_length = info.context_length
        self._max_prompt_chars = prompts.max_prompt_chars(tokenizer, info.context_length)
        eos_token_ids = list(tokenizer.eos_token_ids)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._grammars = GrammarCompiler(tokenizer, info.vocab_size, eos_token_ids) if eos_token_ids else None
        end = self._format.reasoning_end
        self._reasoning_end_ids = (
            () if end is None else tuple(tokenizer.encode(end, add_special_tokens=False))
        )

    @property
    def can_reason(self) -> bool:
        """Whether the model has markers of reasoning."""
        return self._format.can_reason

    def encode(self, job: GenerationJob) -> list[int]:
        """The prompt's token ids.

        Raises:
            RequestError: There are none, or too many for the context; or the answer's grammar cannot be compiled.
        """
        # The Rust tokenizers (tokenizers 0.23) and llguidance (1.9) release the GIL while they work.
        self._compiled(job)  # cached for `build`
        job = msgspec.structs.replace(job, prompt=with_defaults(job.prompt, self._template_arguments))
        return prompts.tokenize(
            job, self._tokenizer, self._context_length, self._format, self._max_prompt_chars
        )

    def make_prompt_tokenizer(self) -> OwnPromptTokenizer:
        """See `worker.loop.engine.Engine`."""
        return OwnPromptTokenizer(
            self._tokenizer, self._format, self._max_prompt_chars, self._template_arguments
        )

    def build(self, job: GenerationJob, prompt: list[int], replay: list[int], max_tokens: int) -> Generation:
        """Create the state of a job's generation, which continues after the tokens that other workers generated.

        Raises:
            RequestError: 400; its grammar cannot be compiled.
        """
        detokenizer = self._token_bytes.new_detokenizer(after_template=is_new_turn(job))
        silent = self._tokens_without_text(job)
        insert_result = InsertResult(
            len(prompt),
            max_tokens,
            replayed_texts=["" if token_id in silent else detokenizer.add(token_id) for token_id in replay],
            parser=answer_parser.make_parser(job, self._format, prompt, self._token_bytes),
        )
        sampler = SequenceSampler(
            job.sampling,
            num_sampled=len(replay),
            matcher=self._matcher(job, insert_result, prompt),
            num_top_logprobs=job.top_logprobs,
        )
        sampler.observe(replay)
        sequence = BatchSequence(
            job.job_id,
            prompt + replay,
            max_tokens - len(replay),
            sampler,
            processors=logits_processors(job.sampling, sampler),
            ignores_eos=job.sampling.ignore_eos,
            min_tokens=job.sampling.min_tokens - len(replay),
            stop_token_ids=frozenset(job.sampling.stop_token_ids),
            num_replayed=len(replay),
        )
        return Generation(
            job, sequence, detokenizer, silent, len(prompt), len(replay), max_tokens, insert_result
        )

    def _tokens_without_text(self, job: GenerationJob) -> frozenset[int]:
        """An end-of-text token is not text, also if it does not end the answer."""
        return self._eos_token_ids.union(() if job.includes_stop else job.sampling.stop_token_ids)

    def _compiled(self, job: GenerationJob) -> CompiledGrammar | None:
        """The compiled grammar of the answer; None: it is unconstrained."""
        text = answer_format.answer_grammar(job, self._format)
        if text is None:
            return None
        param = "response_format" if job.tool_use is None else "tools"
        if self._grammars is None:
            raise invalid("This model has no end-of-text token, so its answers cannot be constrained.", param)
        return self._grammars.compile(text, param)

    def _matcher(self, job: GenerationJob, insert_result: InsertResult, prompt: list[int]) -> Matcher | None:
        compiled = self._compiled(job)
        is_thinking = insert_result.parser is not None and insert_result.parser.is_reasoning
        matcher: Matcher | None = None
        if compiled is not None:
            matcher = wrap_for_thinking(GrammarMatcher(compiled), self._tokenizer, is_thinking=is_thinking)
        max_tokens = job.max_reasoning_tokens
        if max_tokens is None or not self._reasoning_end_ids:
            return matcher
        parser = answer_parser.make_parser(job, self._format, prompt, self._token_bytes)
        if parser is None:
            return matcher
        detokenizer = self._token_bytes.new_detokenizer(after_template=is_new_turn(job))
        meter = ReasoningMeter(parser, detokenizer, self._tokens_without_text(job))
        return ThinkingBudget(meter, max_tokens, self._reasoning_end_ids, matcher)


def is_new_turn(job: GenerationJob) -> bool:
    """Whether the answer begins a turn after a chat template."""
    return isinstance(job.prompt, ChatPrompt) and not job.prompt.continue_final
