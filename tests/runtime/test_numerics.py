"""Our logits and greedy tokens against transformers' own models, whole and cut in every way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runtime_checkpoints import ARCHITECTURES, NEW_TOKENS, Checkpoint, Checkpoints
from runtime_worlds import BLOCK, fork_world, generate

from runtime.layout import single
from runtime.model.params import checkpoint_tensors
from runtime.rank import param_count
from twin.spec.plan import Plan, PoolPlan


def plan_of(**pool: object) -> Plan:
    return Plan(pools=(PoolPlan(**{"role": "mixed", "block_tokens": BLOCK, "kv_blocks": 64, **pool}),))


def check(made: Checkpoint, results: list[tuple[dict[int, list[int]], dict[int, np.ndarray], int]]) -> None:
    seen = set()
    for tokens, logits, _ in results:
        for i, output in tokens.items():
            assert output == made.tokens[i], f"prompt {i}"
            torch.testing.assert_close(torch.from_numpy(logits[i]), made.logits[i], atol=1e-4, rtol=0)
            seen.add(i)
    assert seen == set(range(len(made.prompts)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_process_equals_transformers(checkpoints: Checkpoints, name: str) -> None:
    made = checkpoints[name]
    check(made, [generate(0, made.model, plan_of(), str(made.folder), made.prompts, NEW_TOKENS)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_counts_are_exact(checkpoints: Checkpoints, name: str) -> None:
    model = checkpoints[name].model
    elements = sum(torch.Size(shape).numel() for shape in checkpoint_tensors(model).values())
    assert elements == model.total_params == param_count(model, single(model))


CUTS = [
    ("deepseek_v3", {"dp": 2, "ep": 2}), ("deepseek_v3", {"dp": 2, "tp": 2, "ep": 4}),
    ("deepseek_v3", {"dp": 4, "ep": 4, "redundant_experts": 4, "placement": "eplb_global"}),
    ("deepseek_v3", {"dp": 2, "tp": 2, "ep": 2}), ("deepseek_v3", {"tp": 2, "ep": 2, "comm": "ag_rs"}),
    ("deepseek_v2", {"tp": 2, "ep": 2}),
    ("qwen3_moe", {"dp": 4, "ep": 4}), ("qwen3_moe", {"dp": 2, "tp": 2, "ep": 1}), ("qwen3_moe", {"tp": 4, "ep": 2}),
    ("qwen3_moe", {"dp": 2, "ep": 2, "comm": "ag_rs"}),
    ("mixtral", {"dp": 2, "ep": 2, "redundant_experts": 2}), ("mixtral", {"tp": 2, "ep": 1}),
    ("gpt_oss", {"tp": 2, "ep": 1}), ("gpt_oss", {"dp": 2, "tp": 2, "ep": 4}), ("gpt_oss", {"dp": 2, "ep": 1, "comm": "gloo"}),
    ("glm4_moe", {"tp": 2, "ep": 2}), ("llama", {"tp": 2}), ("qwen3", {"tp": 2}),
]


MATRIX = [{"dp": dp, "tp": tp, "ep": ep, "comm": comm} for dp in (1, 2, 4) for tp in (1, 2) for ep in (1, 2, 4, 8)
          for comm in ("gloo", "ag_rs") if dp * tp % ep == 0 and dp * tp > 1]


@pytest.mark.slow
@pytest.mark.parametrize("cut", MATRIX, ids=lambda cut: "-".join(f"{k}{v}" for k, v in cut.items()))
def test_all_of_ep_tp_and_dp_equal_transformers(checkpoints: Checkpoints, cut: dict[str, object]) -> None:
    """With replicas where experts are spread; symmetric memory has tests of its own, in the interpreter and on a GPU."""
    made = checkpoints["deepseek_v3"]
    plan = plan_of(**cut, redundant_experts=cut["ep"] if cut["ep"] > 1 else 0)
    results = fork_world(plan.gpus, made.folder.parent, generate, made.model, plan, str(made.folder), made.prompts, NEW_TOKENS)
    check(made, results)


@pytest.mark.parametrize(("name", "cut"), CUTS, ids=[f"{n}-{'-'.join(f'{k}{v}' for k, v in c.items())}" for n, c in CUTS])
def test_every_cut_equals_transformers(checkpoints: Checkpoints, name: str, cut: dict[str, object]) -> None:
    made = checkpoints[name]
    plan = plan_of(**cut)
    results = fork_world(plan.gpus, made.folder.parent, generate, made.model, plan, str(made.folder), made.prompts, NEW_TOKENS)
    check(made, results)
