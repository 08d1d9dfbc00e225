"""Steps with prompts as graphs hold them, against plain steps of the torch backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from runtime_worlds import serve
from test_decode_runner import BLOCK, build, tiny

from runtime.batch import Segment, make_step
from runtime.comm.group import solo
from runtime.kv import make_kv
from runtime.model.transformer import Rig, Transformer
from runtime.ops import ops_for
from runtime.prompts import PromptRunner
from runtime.rank_slice import SliceComm, draw_arrivals, slice_layout, slice_placement
from runtime.types import SamplingParams
from runtime.weights import load_weights
from twin.spec.plan import Plan, PoolPlan

LENS = (5, 9, 4)
DECODES = 2


def prompt(i: int, tokens: int, *, logits: bool = True) -> Segment:
    return Segment([(7 * i + j) % 60 for j in range(tokens)], 0, range(4 * i, 4 * i + 4), True, logits)


def runner_of(transformer: Transformer, kv: list[torch.Tensor], device: torch.device, **more) -> PromptRunner:
    runner = PromptRunner(transformer, kv, BLOCK, most=64, sequences=8, max_context=32,
                          **({"decodes": DECODES, "sizes": [24, 32]} | more))
    runner.states_NH.fill_(float("nan"))
    if device.type == "cuda":
        runner.capture()
    return runner


def close(device: torch.device) -> dict[str, float]:
    return {"atol": 1e-3, "rtol": 1e-3} if device.type == "cpu" else {"atol": 0.15, "rtol": 0.1}


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_prompts_and_decodes_beside_them(device: torch.device, arch: str) -> None:
    """Whole prompts; then two of them go on beside a new one, and the padding writes no KV and loads no expert."""
    model = tiny(arch)
    wide, wide_kv = build(model, "torch", device)
    eager, eager_kv = build(model, "triton", device)
    fast, kv = build(model, "triton", device)
    runner = runner_of(fast, kv, device)
    untouched = [cache.clone() for cache in kv]
    whole = [prompt(0, LENS[0]), prompt(1, LENS[1], logits=False), prompt(2, LENS[2])]
    want = wide.forward(make_step(whole, BLOCK, device), wide_kv, 64)
    assert runner.key_of(whole) == (24, 0)
    logits = runner.run(whole)
    assert len(logits) == 2 and runner.states_NH[:sum(LENS)].isfinite().all()
    torch.testing.assert_close(logits, want, **close(device))
    mixed = [Segment([3], LENS[0], range(4)), Segment([8], LENS[2], range(8, 12)), prompt(3, 14)]
    want = wide.forward(make_step(mixed, BLOCK, device), wide_kv, 64)
    assert runner.key_of(mixed) == (24, DECODES)
    torch.testing.assert_close(runner.run(mixed), want, **close(device))
    for segments in (whole, mixed):
        eager.forward(make_step(segments, BLOCK, device), eager_kv, 64)
    again = [Segment([3], LENS[0], range(4)), prompt(3, 14)]  # fewer decodes than there is room for
    want = wide.forward(make_step(again, BLOCK, device), wide_kv, 64)
    torch.testing.assert_close(runner.run(again), want, **close(device))
    for ours, theirs, before in zip(kv, eager_kv, untouched, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), **close(device))
        assert torch.equal(ours == before, theirs == before), "padding wrote KV"
    loads = [ffn.load_E.sum().item() for ffn in fast.moe_layers]
    tokens = sum(LENS) + 16 + 15
    assert loads == [tokens * model.moe.top_k] * len(loads)


def test_what_no_graph_holds(device: torch.device) -> None:
    transformer, kv = build(tiny("qwen3_moe"), "triton", device)
    runner = PromptRunner(transformer, kv, BLOCK, most=64, sequences=3, decodes=DECODES, max_context=32, sizes=[16, 32])
    decode = Segment([1], 4, range(2))
    assert runner.key_of([prompt(0, 16)]) == (16, 0) and runner.key_of([prompt(0, 8), prompt(1, 9)]) == (32, 0)
    assert runner.key_of([decode]) is None  # the decode runner's
    assert runner.key_of([Segment([1, 2], 4, range(2), True)]) is None  # goes on
    assert runner.key_of([prompt(i, 11) for i in range(3)]) is None  # too many tokens
    assert runner.key_of([prompt(i, 1) for i in range(4)]) is None  # too many sequences
    assert runner.key_of([decode] * 2 + [prompt(1, 1)]) == (16, 2)
    assert runner.key_of([Segment([1, 2, 3], 4, range(2)), prompt(1, 1)]) is None  # a decode of three rows: drafts count
    none = PromptRunner(transformer, kv, BLOCK, most=64, sequences=8, decodes=0, max_context=32, sizes=[16])
    assert none.keys == [(16, 0)] and none.key_of([decode, prompt(1, 1)]) is None


def test_a_slice_takes_padded_prompts(device: torch.device) -> None:
    """What arrives is drawn for the tokens there are; a graph's padding sends nothing and gets nothing."""
    model = tiny("deepseek_v3")
    at = slice_layout(model, 4)
    params = load_weights(model, at, checkpoint=None, seed=3, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
                          device=device)
    found = []
    for padded in (False, True):
        comm = SliceComm(draw_arrivals(model, at, 14, skew=0.0, seed=1, device=device), padded=padded)
        transformer = Transformer(model, at, params, Rig(ops_for("triton"), solo(), comm), slice_placement(model, at))
        kv = make_kv(model, at, 16, BLOCK, params["embed"].dtype, device)
        segments = [prompt(0, 6), prompt(1, 8)]
        if padded:
            found.append(runner_of(transformer, kv, device, decodes=0).run(segments))
        else:
            found.append(transformer.forward(make_step(segments, BLOCK, device), kv, 14))
    torch.testing.assert_close(found[1], found[0], **close(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the world that serves is a CPU's")
def test_served_requests_take_their_prompts_from_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are those of an engine without; prompts that begin beside decodes are in them, one that goes on is not."""
    model = tiny("qwen3_moe")
    pool = PoolPlan(role="mixed", block_tokens=BLOCK, kv_blocks=16, max_num_seqs=3, max_batch_tokens=12, chunk_tokens=8)
    requests = [([(5 * i + j) % 60 for j in range(n)], SamplingParams(max_tokens=3 + i, ignore_eos=True))
                for i, n in enumerate((4, 6, 11, 5))]
    taken: list[tuple[int, int]] = []
    run = PromptRunner.run

    def noted(self: PromptRunner, segments: list[Segment], key: tuple[int, int] | None = None) -> torch.Tensor:
        taken.append((sum(not s.is_prefill for s in segments), sum(s.is_prefill for s in segments)))
        assert not any(s.start for s in segments if s.is_prefill)
        return run(self, segments, key)

    monkeypatch.setattr(PromptRunner, "run", noted)

    def fit(rank):
        plain = rank.transformer
        fast = Transformer(model, rank.at, plain.params, replace(plain.rig, ops=ops_for("triton")), rank.placement)
        return replace(rank, transformer=fast, prompts=PromptRunner(
            fast, rank.kv, BLOCK, most=pool.max_step_tokens, sequences=3, decodes=3, max_context=rank.max_context))

    want = serve(0, model, Plan(pools=(pool,)), None, requests).outputs
    assert serve(0, model, Plan(pools=(pool,)), None, requests, fit).outputs == want
    assert any(decodes for decodes, _ in taken) and not all(decodes for decodes, _ in taken)
