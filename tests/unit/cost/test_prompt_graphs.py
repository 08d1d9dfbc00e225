"""Steps with prompts as CUDA graphs: which are, what they are padded to, and what padding costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cost_cases import cost_model, gqa_model, mla_model, pool_of

from twin.cost.batch import INDEX, StepBatch
from twin.cost.engines import ENGINES
from twin.cost.evidence import Evidence
from twin.cost.model import CostModel
from twin.spec.load import load_cluster, load_model
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

QWEN, R1 = load_model("qwen3-30b-a3b"), load_model("deepseek-r1")
ONE, EIGHT = "h200-1x1", "h200-1x8"


def launched(cost: CostModel, batch: StepBatch) -> bool:
    """Whether the step waits for its launches."""
    return "host/launch" in cost.step(batch).parts_s


def mixed(decodes: int, prompt: int, context: int = 500) -> StepBatch:
    return replace(StepBatch.prefill([prompt]), decode_seqs=np.array([decodes]), decode_context=np.array([decodes * context]))


def slice_of(model: ModelSpec, ranks: int, *, alone: bool, **pool: Any) -> CostModel:
    made = pool_of(dp=ranks, ep=ranks, max_batch_tokens=8192, **pool)
    return CostModel(model, load_cluster(EIGHT), Plan(pools=(made,)), made, alone=alone)


@pytest.mark.parametrize("batch", [StepBatch.prefill([100]), StepBatch.prefill([200], seqs=[4]), mixed(20, 80)],
                         ids=["prompt", "four prompts", "beside decodes"])
def test_small_steps_with_prompts_do_not_wait_for_launches(batch: StepBatch) -> None:
    graph, eager = (cost_model(QWEN, ONE, pool_of(cuda_graphs=on)) for on in (True, False))
    assert launched(eager, batch) and not launched(graph, batch)
    assert graph.step_s(batch) < eager.step_s(batch)
    for cost in (graph, eager):
        assert cost.step_s(batch) == pytest.approx(cost.step(batch).total_s, rel=1e-12)


def test_beyond_the_largest_graph_all_is_as_it_was() -> None:
    pool = {"max_batch_tokens": 16_384, "max_num_seqs": 64}
    graph, eager = (cost_model(QWEN, ONE, pool_of(cuda_graphs=on, **pool)) for on in (True, False))
    most, more = (StepBatch.prefill([tokens]) for tokens in (4096, 4097))
    assert graph.step(more) == eager.step(more)
    assert graph.graphs.cover(graph._features(most)[None]).all() and not graph.graphs.cover(graph._features(more)[None]).any()
    small = cost_model(QWEN, ONE, pool_of(max_batch_tokens=300, max_num_seqs=8))
    assert small.graphs.prompts[-1] == small.graphs.beside[-1] == 300, "no graph is larger than a step can be"
    assert cost_model(QWEN, ONE, pool_of(max_batch_tokens=16, max_num_seqs=40)).graphs.prompts.tolist() == [40]


@pytest.mark.parametrize(("batch", "tokens"), [
    (StepBatch.prefill([40]), 64), (StepBatch.prefill([65]), 80), (StepBatch.prefill([112]), 112),
    (StepBatch.prefill([130]), 160), (mixed(1, 64), 96), (mixed(20, 110), 192),
    (StepBatch.decode([17], [1700]), 32), (StepBatch.prefill([0]), 0)])
def test_tokens_are_those_of_the_next_rung(batch: StepBatch, tokens: int) -> None:
    """Beside decodes every second rung exists; decodes alone keep their own sizes; whose tokens are whose stays known."""
    cost, own = (cost_model(QWEN, ONE, pool_of(cuda_graphs=on)) for on in (True, False))
    x, plain = cost._features(batch)[0], own._features(batch)[0]
    assert x[INDEX["tokens"]] == tokens
    changed = {name for name, i in INDEX.items() if x[i] != plain[i]}
    if batch.prefill_tokens[0]:
        assert changed <= {"tokens", "padding"} and x[INDEX["padding"]] == tokens - plain[INDEX["tokens"]]
    else:
        assert not x[INDEX["padding"]]


@pytest.mark.parametrize(("batch", "covered"), [
    (StepBatch.prefill([100], [1]), False), (StepBatch.prefill([100], [2048]), False),
    (StepBatch.prefill([300], [400], 3), False), (StepBatch.prefill([300], seqs=3), True),
    (replace(StepBatch.prefill([100]), prefill_context=np.array([100 * 101 / 2])), True)])  # pairs counted one by one
def test_prompts_that_go_on_run_without_graphs(batch: StepBatch, covered: bool) -> None:
    """Later chunks of long prompts and what follows a cached prefix: the runtime's graphs hold whole prompts."""
    cost, eager = (cost_model(QWEN, ONE, pool_of(cuda_graphs=on)) for on in (True, False))
    assert launched(cost, batch) != covered
    assert covered or cost.step(batch) == eager.step(batch)


def test_steps_are_padded_one_by_one() -> None:
    """Many steps at once cost what each does alone; the attention of prompts knows its chunks whatever the padding."""
    cost = cost_model(QWEN, ONE, pool_of())
    each = [mixed(20, 80), mixed(3, 500), mixed(8, 120)]
    names = ("decode_seqs", "decode_context", "prefill_tokens", "prefill_context", "prefill_seqs")
    together = StepBatch(*(np.stack([getattr(batch, name) for batch in each]) for name in names))
    assert cost.steps_s(together) == pytest.approx([cost.step_s(batch) for batch in each], rel=1e-12)


def test_padding_costs_products_alone() -> None:
    """513 tokens run as 640: the router, norms and projections of 640; experts, attention and LM head of 513."""
    evidence = Evidence.load()
    pool = pool_of(max_batch_tokens=4096)
    plan, cluster = Plan(pools=(pool,)), load_cluster(ONE)
    graph = CostModel(QWEN, cluster, plan, pool, profile=evidence)
    off = pool.model_copy(update={"cuda_graphs": False})
    eager = CostModel(QWEN, cluster, plan, off, profile=evidence)

    def parts(cost: CostModel, tokens: int) -> dict[str, float]:
        return cost.step(StepBatch.prefill([tokens])).parts_s

    padded, own, full = parts(graph, 513), parts(eager, 513), parts(eager, 640)
    for key in ("attention/projections", "moe/gate", "norm", "embedding"):
        assert padded[key] == pytest.approx(full[key], rel=1e-12) and padded[key] > own[key], key
    for key in ("moe/experts", "moe/permute", "attention/prefill", "head", "sampling"):
        assert padded.get(key, 0.0) == pytest.approx(own.get(key, 0.0), rel=1e-12), key


def test_a_slice_replays_prompts_and_an_instance_does_not() -> None:
    """A rank alone has nobody to agree with. What stands for its exchanges copies no padding."""
    alone, whole = (slice_of(R1, 8, alone=alone) for alone in (True, False))
    batch = StepBatch.prefill([100])
    assert not launched(alone, batch) and launched(whole, batch)
    assert alone._features(batch)[0, INDEX["tokens"]] == 112 and whole._features(batch)[0, INDEX["tokens"]] == 100
    eager = slice_of(R1, 8, alone=True, cuda_graphs=False)
    for key in ("moe/dispatch/copy", "moe/combine/copy"):
        in_graph, plain = (cost.step(batch).parts_s[key] for cost in (alone, eager))
        assert in_graph == pytest.approx(plain, rel=1e-9)
    assert alone.step(batch).parts_s["moe/shared"] > eager.step(batch).parts_s["moe/shared"]


@pytest.mark.parametrize(("model", "cluster", "pool", "engine"), [
    (gqa_model(), "cpu-2rank", {}, "eptwin"), (gqa_model(), ONE, {"tbo": True}, "eptwin"),
    (mla_model(), ONE, {"mtp_draft_tokens": 1}, "eptwin"), (gqa_model(), EIGHT, {"tp": 2}, "eptwin"),
    (gqa_model(), EIGHT, {"dp": 2, "ep": 2}, "eptwin"), (gqa_model(), ONE, {"cuda_graphs": False}, "eptwin"),
    *((gqa_model(), ONE, {}, name) for name in ENGINES if name != "eptwin")])
def test_others_run_prompts_as_they_did(model: ModelSpec, cluster: str, pool: dict[str, Any], engine: str) -> None:
    cost = cost_model(model, cluster, pool_of(**pool), engine=engine)
    ranks = pool.get("dp", 1)
    batch = StepBatch.prefill([70] * ranks)
    x = cost._features(batch)
    assert not len(cost.graphs.prompts) and not cost.graphs.cover(x[None]).any()
    assert (x[:, INDEX["tokens"]] == 70).all()
    assert cost_model(gqa_model(), ONE, pool_of()).graphs.prompts.any(), "and ours on a GPU of its own does"


def test_another_limit_is_another_ladder() -> None:
    """Models that differ in limits alone share what was compiled, not the graphs."""
    cost = cost_model(QWEN, ONE, pool_of())
    pool: PoolPlan = cost.pool.model_copy(update={"max_batch_tokens": 100})
    other = cost.limited(cost.plan, pool)
    assert (cost.graphs.prompts[-1], other.graphs.prompts[-1]) == (512, 100)
