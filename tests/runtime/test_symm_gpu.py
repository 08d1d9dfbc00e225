"""Ranks that share one GPU through MPS: a model whose experts are spread over them by symmetric memory, against the same
model in one process; and whole decode steps of all ranks as CUDA graphs, against the same steps taken eagerly."""

from __future__ import annotations

import json
import os
import threading
import traceback
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from runtime.batch import Segment, make_step
from runtime.comm.experts import Local, Symmetric, make_expert_comm
from runtime.comm.group import Group, PeerLost, make_group, solo
from runtime.comm.waiting import Waiting, check_peers
from runtime.kv import make_kv
from runtime.layout import RankLayout, single
from runtime.model.transformer import Rig, Transformer
from runtime.mps import MpsUnavailable, share_gpu
from runtime.ops import ops_for
from runtime.tiny import tiny_config
from runtime.weights import load_weights
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec

BLOCK, NEW_TOKENS = 4, 8
Weights = tuple[Transformer, list[torch.Tensor]]


def build(model: ModelSpec, at: RankLayout, group: Group, backend: str, dtype: torch.dtype, *, fp8: bool = False) -> Weights:
    device = torch.device("cuda", torch.cuda.current_device())
    params = load_weights(model, at, checkpoint=None, seed=3, dtype=dtype, device=device)
    comm = make_expert_comm("auto", group, at, device="cuda", fp8=fp8) if group.size > 1 else Local()
    assert group.size == 1 or isinstance(comm, Symmetric)
    return Transformer(model, at, params, Rig(ops_for(backend), solo(), comm)), make_kv(model, at, 16, BLOCK, dtype, device)


def prompts(rank: int) -> list[Segment]:
    """Two sequences a rank, but the last rank of many has only one."""
    lens = (5, 9) if rank != 7 else (6,)
    return [Segment([(11 * rank + 7 * i + j) % 60 for j in range(n)], 0, range(8 * i, 8 * i + 8), True)
            for i, n in enumerate(lens)]


def step(built: Weights, segments: list[Segment], capacity: int = 16) -> torch.Tensor:
    transformer, kv = built
    return transformer.forward(make_step(segments, BLOCK, kv[0].device), kv, capacity)


def following(segments: list[Segment], tokens: list[int]) -> list[Segment]:
    return [Segment([t], s.start + len(s.token_ids), s.blocks) for s, t in zip(segments, tokens, strict=True)]


def numerics(model: ModelSpec, at: RankLayout, group: Group) -> str:
    """Spread experts against all experts here, fp32, token by token."""
    spread, whole = (build(model, a, g, "torch", torch.float32) for a, g in ((at, group), (single(model), solo())))
    segments = prompts(at.rank)
    for n in range(NEW_TOKENS):
        got, want = step(spread, segments), step(whole, segments)
        if not torch.allclose(got, want, atol=1e-4, rtol=0):
            return f"token {n}: logits off by {(got - want).abs().max().item()}"
        segments = following(segments, want.argmax(-1).tolist())
    check_peers(spread[0].rig.experts)
    moved = spread[0].rig.experts.sent_bytes
    return "" if moved > 0 else "nothing was sent"


def graphs(model: ModelSpec, at: RankLayout, group: Group) -> str:
    """Decode steps in graphs of two sizes against the same steps without: the same kernels, so the same numbers. The last rank
    is idle in some of them, and runs padding."""
    from runtime.decode import DecodeRunner

    def agreed(n: int) -> tuple[bool, int]:
        """(whether this rank is idle, the size) in step n; rank 7 never has more than one row."""
        return n % 3 == 1 and at.rank == at.world - 1, 2 if n % 2 else 4

    built = build(model, at, group, "triton", torch.bfloat16)
    first = prompts(at.rank)
    drawn_first = step(built, first).argmax(-1).tolist()
    outputs = []
    for captured in (False, True):
        runner = DecodeRunner(*built, BLOCK, most=4, max_context=32, sizes=[2, 4])
        if captured:
            runner.capture()
        steps, segments = [], following(first, drawn_first)
        for n in range(NEW_TOKENS):
            idle, size = agreed(n)
            drawn = runner.run([] if idle else segments, size)
            steps.append((drawn.tokens.tolist(), drawn.logits.clone()))
            segments = segments if idle else following(segments, steps[-1][0])
        outputs.append(steps)
    check_peers(built[0].rig.experts)
    for n, (eager, replayed) in enumerate(zip(*outputs, strict=True)):
        if eager[0] != replayed[0] or not torch.equal(eager[1], replayed[1]):
            return f"step {n}: {replayed[0]} in the graph, {eager[0]} without"
    return ""


def narrow(model: ModelSpec, at: RankLayout, group: Group) -> str:
    """Rows that travel in fp8 and are read so by experts: logits close to those of rows in bf16."""
    wide, fp8 = (build(model, at, group, "triton", torch.bfloat16, fp8=how) for how in (False, True))
    got, want = step(fp8, prompts(at.rank)), step(wide, prompts(at.rank))
    check_peers(fp8[0].rig.experts)
    error = ((got - want).norm() / want.norm()).item()
    return "" if 0 < error < 0.15 else f"fp8 rows: logits off by {error}"


def called_off(at: RankLayout, group: Group) -> str:
    """Rank 0 waits in a captured barrier for ranks that stay away, with patience for an hour, until its host calls it off."""
    from runtime.comm.symm import SymmExchange, over

    waiting = Waiting(group.ranks, 3600.0)
    exchange = SymmExchange(over(group.pg), group.index, waiting, slots_per_rank=1)
    x, slots = torch.ones(1, 64, device="cuda"), torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        arrival = exchange.dispatch(x, slots, torch.ones(1, 1, device="cuda"), 1)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        exchange.meet(arrival)
    dist.barrier()
    if at.rank == 0:
        threading.Timer(0.5, waiting.call_off).start()
        graph.replay()
        torch.cuda.synchronize()
        try:
            waiting.check()
        except PeerLost as lost:
            return "" if "called off" in str(lost) else str(lost)
        return "nobody was missed"
    return ""


def work(rank: int, world: int, folder: str) -> None:
    try:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_grad_enabled(False)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        config = tiny_config("deepseek_v3", hidden=256, layers=3, experts=16, top_k=4, vocab=64, context=64)
        model = model_from_hf_config(config, name="tiny")
        at = RankLayout(rank, 0, "mixed", 0, 0, world, 1, world, rank, 0, 16)
        group = make_group(range(world), rank, 60)
        wrong = [numerics(model, at, group), graphs(model, at, group), narrow(model, at, group), called_off(at, group)]
        Path(folder, f"rank{rank}.json").write_text(json.dumps(wrong))
        dist.barrier()
    except BaseException:
        Path(folder, f"rank{rank}.json").write_text(json.dumps([traceback.format_exc()]))
    os._exit(0)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 8])
def test_ranks_on_one_gpu_answer_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    try:
        with share_gpu() as env:
            for name, value in {**env, "GLOO_SOCKET_IFNAME": "lo"}.items():
                monkeypatch.setenv(name, value)
            children = [get_context("spawn").Process(target=work, args=(r, world, str(tmp_path))) for r in range(world)]
            for child in children:
                child.start()
            for child in children:
                child.join(100)
            for child in children:
                if child.is_alive():
                    child.kill()
    except MpsUnavailable as err:
        pytest.skip(str(err))
    written = {r: tmp_path / f"rank{r}.json" for r in range(world)}
    results = {r: json.loads(path.read_text()) if path.exists() else ["silent"] for r, path in written.items()}
    assert all(wrong == [""] * 4 for wrong in results.values()), results
