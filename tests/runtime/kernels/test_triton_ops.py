"""The GPU's operators against the plain ones, on whole mixed steps and small odd shapes."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, normal, relative_error

pytest.importorskip("triton")

from runtime.batch import Segment, make_step
from runtime.kernels.gate import gate_topk, router_logits
from runtime.ops import ExpertWeights, Router, TorchOps
from runtime.quantise import quantise_rows
from runtime.triton_ops import TritonOps
from twin.spec.model import MoE

PLAIN, FAST = TorchOps(), TritonOps()
STEP = [Segment([1], 16, [3, 0]), Segment([1], 0, [5]), Segment([1], 31, [6, 1]), Segment([1] * 5, 14, [2, 7], True)]


@pytest.mark.parametrize(("window", "sinks"), [(None, False), (8, True)])
def test_attention_of_a_mixed_step(device: torch.device, rng: torch.Generator, window: int | None, sinks: bool) -> None:
    cache = normal(rng, 8, 2, 16, 2, 32, dtype=HALF).to(device)
    q = normal(rng, 8, 4, 32, dtype=HALF).to(device)
    sink = normal(rng, 4).to(device) if sinks else None
    for segments in (STEP, STEP[:3], STEP[3:]):
        step = make_step(segments, 16, device)
        more = {"scale": 0.2, "window": window, "sinks_Q": sink}
        want = PLAIN.attention(q[:step.num_tokens].float(), cache.float(), step, **more)
        got = FAST.attention(q[:step.num_tokens], cache, step, **more)
        assert relative_error(got, want) < 0.01


@pytest.mark.parametrize("window", [None, 8])
def test_prompts_with_and_without_a_past(device: torch.device, rng: torch.Generator, window: int | None) -> None:
    """A prompt that goes on reads what is stored; one without a past reads what the step itself made."""
    segments = [STEP[1], Segment([1] * 9, 0, [4], True), Segment([1] * 5, 14, [2, 7], True), Segment([1] * 3, 0, [6], True)]
    step = make_step(segments, 16, device)
    cache, qkv = normal(rng, 8, 2, 16, 2, 32, dtype=HALF), normal(rng, 18, 8, 32, dtype=HALF)
    q, k, v = qkv.to(device).split([4, 2, 2], 1)
    cache = cache.to(device)
    PLAIN.store_kv(cache, k, v, step.slots_T)
    more = {"scale": 0.2, "window": window, "sinks_Q": None}
    want = PLAIN.attention(q.float(), cache.float(), step, **more)
    for block in (4, 6):  # whole prompts need nothing stored
        cache[block] = float("nan")
    assert relative_error(FAST.attention(q, cache, step, fresh=(k, v), **more), want) < 0.01


def test_prompts_in_parts(device: torch.device) -> None:
    step = make_step([STEP[0], *(Segment([1] * n, 0, [n], True) for n in (3, 5, 2)), STEP[3]], 16, device)
    parts = list(step.prompt_parts(8))
    assert [(at, part.query_lens, part.context_lens) for at, part in parts] == [
        (slice(0, 8), (3, 5), (3, 5)), (slice(8, 10), (2,), (2,)), (slice(10, 15), (5,), (19,))]
    assert [part.prompt_pieces().tolist()[1:] for _, part in parts] == [
        [[3, 5, 3, 5], [0, 3, 0, 3]], [[0, 2, 0, 2]], [[0, 5, 0, 19]]]
    assert parts[2][1].block_tables_SB[0].tolist() == [2, 7]
    assert [(at, part is step) for at, part in step.prompt_parts(99)] == [(slice(0, 15), True)]


def test_latent_prompts(device: torch.device, rng: torch.Generator) -> None:
    step = make_step([STEP[1], Segment([1] * 9, 0, [4], True), STEP[3]], 16, device)
    q, kv = normal(rng, 14, 4, 40, dtype=HALF).to(device), normal(rng, 28, 4, 56, dtype=HALF).to(device)
    k, v, rope = kv[..., :32], kv[..., 32:], normal(rng, 28, 8, dtype=HALF).to(device)
    want = PLAIN.expanded_attention(q.float(), k.float(), v.float(), rope.float(), step, scale=0.2)
    assert relative_error(FAST.expanded_attention(q, k, v, rope, step, scale=0.2), want) < 0.01


def test_latent_decode(device: torch.device, rng: torch.Generator) -> None:
    cache, q = normal(rng, 8, 16, 48, dtype=HALF).to(device), normal(rng, 3, 4, 48, dtype=HALF).to(device)
    step = make_step(STEP, 16, device)
    want = PLAIN.mla_decode(q.float(), cache.float(), step, scale=0.2, latent=32)
    assert relative_error(FAST.mla_decode(q, cache, step, scale=0.2, latent=32), want) < 0.01


@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_experts_of_which_some_are_elsewhere(device: torch.device, rng: torch.Generator, limit: float | None, rows: int) -> None:
    biases = (normal(rng, 4, 32), normal(rng, 4, 64)) if limit else (None, None)
    w = [normal(rng, 4, 32, 64, scale=0.1), normal(rng, 4, 64, 16, scale=0.2), *biases]
    plain = ExpertWeights(*(None if t is None else t.to(device) for t in w))
    half = ExpertWeights(*(None if t is None else t.to(device, HALF) for t in w))
    x = normal(rng, rows, 64, dtype=HALF).to(device)
    slots = torch.randint(-1, 4, (rows, 3), generator=rng).to(device)
    weights = torch.rand(rows, 3, generator=rng).to(device)
    want = PLAIN.experts(x.float(), slots, weights, plain, limit)
    got = FAST.experts(x, slots, weights, half, limit)
    assert got.shape == want.shape
    assert rows == 0 or relative_error(got, want) < 0.02


@pytest.mark.parametrize("moe", [
    MoE(experts=16, top_k=4, intermediate=8, scoring="sigmoid", score_bias=True, groups=4, top_k_groups=2, routed_scaling=2.5),
    MoE(experts=16, top_k=4, intermediate=8, groups=4, top_k_groups=2, norm_top_k=False), MoE(experts=8, top_k=2, intermediate=8),
], ids=["v3", "v2", "softmax"])
def test_routing(device: torch.device, rng: torch.Generator, moe: MoE) -> None:
    x, weight = normal(rng, 9, 32).to(device), normal(rng, moe.experts, 32).to(device)
    bias = normal(rng, moe.experts, scale=0.1).to(device) if moe.score_bias else None
    router = Router(weight, None, bias)
    slots = torch.arange(9, device=device)
    slots[3] = -1
    loads = [torch.zeros(moe.experts, dtype=torch.int64, device=device) for _ in range(2)]
    (ids, weights), (want_ids, want) = (ops.route(x, router, moe, slots, load)
                                        for ops, load in zip((FAST, PLAIN), loads, strict=True))
    assert (ids[3] == -1).all() and (want_ids[3] == -1).all() and loads[0].sum() == 8 * moe.top_k
    assert torch.equal(loads[0], loads[1])
    none, real = torch.zeros(8, moe.experts, device=device), slots >= 0
    got, wanted = none.scatter(1, ids[real].long(), weights[real]), none.scatter(1, want_ids[real], want[real])
    assert torch.allclose(got, wanted, atol=1e-5)
    assert FAST.route(x[:0], router, moe, slots[:0], loads[0])[0].shape == (0, moe.top_k)


@pytest.mark.parametrize("tokens", [1, 17, 70, 600])
def test_router_logits_are_summed_in_fp32(device: torch.device, rng: torch.Generator, tokens: int) -> None:
    if tokens > 512 and device.type == "cpu":
        pytest.skip("torch has no half product with fp32 output on a CPU")
    x, weight = normal(rng, tokens, 600, dtype=HALF).to(device), normal(rng, 24, 600, dtype=HALF).to(device)
    logits = router_logits(x, weight)
    split, whole = gate_topk(logits, 4), gate_topk(logits.sum(0), 4)
    assert torch.equal(split[1], whole[1]) and torch.allclose(split[0], whole[0], atol=1e-5)
    assert relative_error(router_logits(x, weight).sum(0), x.double() @ weight.double().T) < 1e-5


@pytest.mark.parametrize("rows", [1, 60])
def test_experts_of_fp8_weights(device: torch.device, rng: torch.Generator, rows: int) -> None:
    w13, w2 = normal(rng, 4, 64, 64, scale=0.1).to(device), normal(rng, 4, 64, 32, scale=0.2).to(device)
    (n13, s13), (n2, s2) = quantise_rows(w13), quantise_rows(w2)
    x = normal(rng, rows, 64, dtype=HALF).to(device)
    slots = torch.randint(0, 4, (rows, 3), generator=rng).to(device)
    weights = torch.rand(rows, 3, generator=rng).to(device)
    narrow = ExpertWeights(n13, n2, s13=s13, s2=s2)
    want = PLAIN.experts(x.float(), slots, weights, narrow, None)
    bound = 0.02 if rows == 1 else 0.1  # of many rows, activations are fp8 too
    assert relative_error(FAST.experts(x, slots, weights, narrow, None), want) < bound


def test_norm_and_activation(device: torch.device, rng: torch.Generator) -> None:
    x, weight = normal(rng, 5, 96).to(device), normal(rng, 96).to(device)
    assert torch.allclose(FAST.rms_norm(x, weight, 1e-6), PLAIN.rms_norm(x, weight, 1e-6), atol=1e-5)
    assert torch.allclose(FAST.gated(x, None), PLAIN.gated(x, None), atol=1e-5)
    assert FAST.rms_norm(x[:0], weight, 1e-6).shape == (0, 96)
