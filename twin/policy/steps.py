"""The words of batching: what a step may hold, what it does, where a request stands."""

from __future__ import annotations

from dataclasses import dataclass

from twin.policy.kv_blocks import Blocks
from twin.spec.errors import Problem, SpecError


@dataclass(frozen=True)
class BatchLimits:
    """What one step may hold.

    `max_seqs` running requests; `max_batch_tokens` tokens a step, decodes included. `chunk_tokens`: the most prompt
    tokens of one step, over all its requests; None turns chunked prefill off, a prompt then goes whole (only a
    recompute longer than `max_batch_tokens` is still cut). `max_context_tokens`: the longest prompt plus output.
    `prefill_first`: steps are either prefill or decode, prefill before decode; otherwise decodes come first and
    prefill fills what they leave. `watermark`: fraction of blocks that admission leaves free for running decodes to
    grow into.
    """

    max_seqs: int
    max_batch_tokens: int
    chunk_tokens: int | None = None
    max_context_tokens: int | None = None
    prefill_first: bool = False
    watermark: float = 0.0

    def __post_init__(self) -> None:
        problems = [Problem(f"is {value}", field=field, expected="at least 1") for field, value in (
            ("max_seqs", self.max_seqs), ("max_batch_tokens", self.max_batch_tokens),
            ("chunk_tokens", self.chunk_tokens), ("max_context_tokens", self.max_context_tokens),
        ) if value is not None and value < 1]
        if self.max_batch_tokens < self.max_seqs:
            problems.append(Problem(f"is {self.max_batch_tokens}", field="max_batch_tokens",
                                    expected=f"at least max_seqs = {self.max_seqs}",
                                    hint="a step must be able to decode every running sequence"))
        if not 0.0 <= self.watermark < 1.0:
            problems.append(Problem(f"is {self.watermark}", field="watermark", expected="0 <= watermark < 1"))
        if problems:
            raise SpecError(problems)


@dataclass(frozen=True)
class PrefillChunk:
    """Compute `tokens` tokens of a request from position `start`; after `is_last` its next token comes out."""

    request_id: int
    start: int
    tokens: int
    is_last: bool


@dataclass(frozen=True)
class StepPlan:
    """One step. `decode_tokens[i]` tokens (1 and its drafts) go in for `decode[i]`. `preempted` lost their blocks."""

    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    decode_tokens: tuple[int, ...] = ()

    @property
    def prefill_tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.prefill)

    @property
    def total_tokens(self) -> int:
        return self.prefill_tokens + sum(self.decode_tokens)

    @property
    def is_empty(self) -> bool:
        return not self.prefill and not self.decode


@dataclass(frozen=True)
class RequestState:
    """`phase` is waiting, prefill, decode or held (left, but its blocks wait for `release`)."""

    phase: str
    prompt_tokens: int
    computed_tokens: int
    generated_tokens: int
    preemptions: int


def check_request(limits: BatchLimits, blocks: Blocks, prompt: int, max_new: int, computed: int, generated: int) -> None:
    """Raise SpecError for a request of these tokens that could never run, even alone."""
    bad = (
        prompt < 1,
        max_new < 1,
        not 0 <= generated < max(max_new, 1),
        not 0 <= computed < max(prompt + generated, 1),
        limits.max_context_tokens is not None and prompt + max_new > limits.max_context_tokens,
        blocks.blocks_for(prompt + max_new - 1) > blocks.num_blocks,
        limits.chunk_tokens is None and not generated and prompt - computed > limits.max_batch_tokens,
    )
    if not any(bad):
        return
    told = (
        ("prompt_tokens", f"is {prompt}", "at least 1"),
        ("max_new_tokens", f"is {max_new}", "at least 1"),
        ("generated_tokens", f"is {generated}", f"0..{max_new - 1}"),
        ("computed_tokens", f"is {computed}", f"0..{prompt + generated - 1}"),
        ("max_new_tokens", f"prompt {prompt} + output {max_new} tokens exceed the context",
         f"at most {limits.max_context_tokens} together"),
        ("max_new_tokens", f"prompt {prompt} + output {max_new} tokens exceed the KV cache",
         f"at most {blocks.num_blocks * blocks.block_tokens + 1} together"),
        ("prompt_tokens", f"{prompt} tokens exceed a step and chunked prefill is off",
         f"at most max_batch_tokens = {limits.max_batch_tokens}"),
    )
    raise SpecError([Problem(message, field=field, expected=expected)
                     for wrong, (field, message, expected) in zip(bad, told, strict=True) if wrong])
