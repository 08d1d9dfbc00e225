"""After the warm-up a served run meets no kernel that was not compiled: counted by Triton's own hook on a GPU, and by what
Triton would key a kernel by where kernels run under the interpreter, which compiles nothing."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).parents[1]))
from runtime_worlds import serve

from runtime import warmup
from runtime.compiles import Compiles
from runtime.kernels import align, moe_layer
from runtime.model.transformer import Transformer
from runtime.ops import ops_for
from runtime.rank import Rank
from runtime.tiny import tiny_config
from runtime.types import SamplingParams
from runtime.warmup import warm_up
from twin.spec.hf import model_from_hf_config
from twin.spec.plan import Plan, PoolPlan


def specialised(value: Any) -> Any:
    """What of an argument Triton compiles for."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value).__name__
    return 1 if value == 1 else (value % 16 == 0, value.bit_length() > 31)


def key_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What a launch would be cached under."""
    parameters = inspect.signature(kernel.fn).parameters
    named = dict(zip(parameters, args, strict=False)) | options
    plain = kernel.kwargs.get("do_not_specialize") or ()
    unaligned = kernel.kwargs.get("do_not_specialize_on_alignment") or ()
    found = []
    for name, value in named.items():
        if name not in parameters or "constexpr" in str(parameters[name].annotation):
            found.append((name, value))
        elif name in plain or name in unaligned:
            found.append((name, str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__))
        else:
            found.append((name, specialised(value)))
    return kernel.fn.__name__, *found


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Keys of all kernels launched."""
    seen: set[tuple[Any, ...]] = set()
    plain: Callable[..., Any] = interpreter.InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        seen.add(key_of(self, args, options))
        return plain(self, *args, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU benchmarks/serve.py counts real compilations")
@pytest.mark.parametrize("arch", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_a_served_run_meets_no_new_kernel(arch: str, launches: set[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_layer, "_GROUPED_ROWS", 2)  # so that the steps of a tiny model cross every threshold
    monkeypatch.setattr(align, "_HISTOGRAM_ROWS", 10)
    layers = 2 if arch == "deepseek_v3" else 1
    model = model_from_hf_config(tiny_config(arch, hidden=32, layers=layers, experts=8, top_k=2, vocab=64, context=16), arch)
    pool = PoolPlan(role="mixed", block_tokens=4, kv_blocks=8, max_num_seqs=2, max_batch_tokens=7, chunk_tokens=5)
    warmed: set[tuple[Any, ...]] = set()
    report: dict[str, float] = {}

    def fit(rank: Rank) -> Rank:
        plain = rank.transformer
        fast = Transformer(model, rank.at, plain.params, replace(plain.rig, ops=ops_for("triton")), rank.placement)
        rank = replace(rank, transformer=fast)
        report.update(warm_up(rank))
        assert all(not ffn.load_E.any() for ffn in fast.moe_layers), "warm-up is no load"
        warmed.update(launches)
        launches.clear()
        return rank

    lens = (1, 2, 5, 7, 3)
    requests = [([(3 * i + j) % 60 for j in range(n)], SamplingParams(max_tokens=1 + i % 2, ignore_eos=True))
                for i, n in enumerate(lens)]
    served = serve(0, model, Plan(pools=(pool,)), None, requests, fit)
    assert len(served.outputs) == len(lens) and report["steps"] > 10
    late = [(key, [other for other in warmed if other[0] == key[0]]) for key in launches - warmed]
    told = [(key[0], sorted(set(key[1:]) - set(others[0][1:]), key=str) if others else "never") for key, others in late]
    assert launches and not told, "kernels that a request would have waited for"


def test_every_step_of_the_warm_up_fits_the_engine() -> None:
    """Steps keep to the cache, the batch and the context; the largest comes first and is full."""
    model = model_from_hf_config(tiny_config("qwen3_moe", layers=2, context=64), "tiny")
    for blocks, most, context in ((48, 37, 50), (3, 500, 12), (40, 4, 64)):
        pool = PoolPlan(role="mixed", block_tokens=4, kv_blocks=blocks, max_num_seqs=3, max_batch_tokens=most)
        rank: Any = type("R", (), {"pool": pool, "kv_blocks": blocks, "max_context": context, "model": model,
                                     "prompts": None})
        steps = list(warmup.warm_steps(rank))
        tokens = [sum(len(s.token_ids) for s in step) for step in steps]
        assert tokens[0] == max(tokens) == min(most, blocks * 4)
        assert {1, 2, 4} <= set(tokens)
        for step in steps:
            used = [block for s in step for block in s.blocks]
            assert len(used) == len(set(used)) and max(used) < blocks
            assert all(s.start + len(s.token_ids) <= min(context, 4 * len(s.blocks)) for s in step)


def test_prompts_that_graphs_hold_need_no_warm_up() -> None:
    """Larger steps do, and so do decodes beside prompts and prompts that go on."""
    model = model_from_hf_config(tiny_config("qwen3_moe", layers=2, context=64), "tiny")
    pool = PoolPlan(role="mixed", block_tokens=4, kv_blocks=40, max_num_seqs=3, max_batch_tokens=100)
    held: Any = type("P", (), {"sizes": [16, 32]})
    rank: Any = type("R", (), {"pool": pool, "kv_blocks": 40, "max_context": 64, "model": model, "prompts": held})
    whole = [step for step in warmup.warm_steps(rank) if all(s.is_prefill and not s.start for s in step)]
    assert whole and all(sum(len(s.token_ids) for s in step) > 32 for step in whole)
    rank.prompts = None
    assert len([step for step in warmup.warm_steps(rank) if all(s.is_prefill and not s.start for s in step)]) > len(whole)


def test_late_compilations_are_counted_and_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **what: heard.append(what))
    counts = Compiles()
    counts.listen()
    counts.listen()  # once is enough
    tell = triton.knobs.runtime.jit_post_compile_hook
    kernel = type("Info", (), {"name": "_up_kernel"})
    tell(fn=kernel)
    counts.started()
    with caplog.at_level(logging.WARNING, "eptwin.compiles"):
        tell(fn=kernel)
    counts.starting()  # another formation
    tell(fn=kernel)
    assert (counts.total, counts.late, len(heard)) == (3, ["_up_kernel"], 3)
    assert caplog.text.count("_up_kernel") == 1
