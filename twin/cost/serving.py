"""How engines fill a step and hear of new requests, as data: what `engines.py` is to seconds, this is to scheduling.

Budgets and polling are the engines' documented defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from twin.cost.engine_fits import generation
from twin.spec.cluster import GpuSpec


@dataclass(frozen=True)
class Serving:
    """One engine's scheduler.

    mixed: prompts ride along with decoding sequences in one step; otherwise a step of prompts stalls all that decode.
    chunks: a prompt may be cut to fill the budget; otherwise it waits until it fits whole.
    budget_tokens: tokens of a step (for an engine that does not mix: prompt tokens of a prefill step).
    poll_steps: decode steps between two looks for new requests (1: every step).
    balance_steps: with attention DP, steps that a prompt waits for the other ranks to have one too.
    running: most requests that a rank runs at once, 0 for no bound of its own.
    wait_steps: decode steps that prompts wait until they and the decodes fill `wait_share` of the budget.
    reserved_share: part of its outputs to come that a request's memory is kept free for. Below 1, sequences outgrow memory,
    and who came last loses its own and is computed again.
    """

    mixed: bool
    chunks: bool
    budget_tokens: int
    poll_steps: int
    balance_steps: int = 0
    running: int = 0
    wait_steps: int = 0
    wait_share: float = 0.0
    reserved_share: float = 1.0


def serving_of(engine: str, gpu: GpuSpec, concurrency: int, isl: int) -> Serving:
    """How `engine` serves `concurrency` users with prompts of `isl` tokens on this GPU.

    vLLM: 8192 tokens a step on data-centre GPUs, chunked, decodes first. TensorRT-LLM: whole prompts beside decodes, a
    budget sized to hold one prompt and all decodes; attention-DP ranks wait up to 60 steps to begin prompts together.
    SGLang: prompts alone and first, chunks of 8192 (Hopper) or 16384. TensorRT-LLM never evicts (its default policy), vLLM and
    our engine take blocks as sequences grow. SGLang keeps 0.7 of outputs free at first and less with every step, but takes how
    far sequences have come, about half, each time that memory runs out. What public benchmark runs set instead is in
    `twin.validate.recipes`.
    """
    fast = generation(gpu) == "blackwell"
    if engine == "sglang":
        return Serving(False, True, 16384 if fast else 8192, 1, reserved_share=0.5)
    if engine == "trtllm":
        return Serving(True, False, max(8192, isl + concurrency + 128), 1, balance_steps=60)
    return Serving(True, True, 8192, 1, reserved_share=0.0)
