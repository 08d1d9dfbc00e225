"""What a request must be like to be served at all."""

from __future__ import annotations

from runtime.types import SamplingParams
from twin.spec.errors import Problem, SpecError
from twin.spec.plan import Plan


def check_request(prompt: list[int], params: SamplingParams, plan: Plan, vocab: int, max_context: int) -> None:
    """Raise SpecError with everything that is wrong with a request."""
    problems = []
    if not prompt:
        problems.append(Problem("is empty", field="prompt", expected="at least one token"))
    if prompt and not 0 <= min(prompt) <= max(prompt) < vocab:
        problems.append(Problem("has token ids outside the vocabulary", field="prompt", expected=f"0..{vocab - 1}"))
    if len(prompt) + params.max_tokens > max_context:
        problems.append(Problem(f"prompt {len(prompt)} + output {params.max_tokens} tokens exceed the context",
                                field="max_tokens", expected=f"at most {max_context} together"))
    for pool in plan.pools:
        if pool.role != "decode" and pool.chunk_tokens is None and len(prompt) > pool.max_batch_tokens:
            problems.append(Problem(f"{len(prompt)} tokens exceed a step and chunked prefill is off", field="prompt",
                                    expected=f"at most {pool.max_batch_tokens}"))
    if problems:
        raise SpecError(problems)
