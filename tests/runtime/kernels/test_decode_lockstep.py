"""Ranks whose experts are spread take decode steps of one size together: idle ones with padding alone, and all of them plain
steps as soon as one has a prompt. The runner computes its steps without graphs here; when and in which size is the same, and so
are halves that overlap, and the sums of TP ranks through (the hosts') shared memory."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_worlds import Served, fork_world, serve
from test_symm_reduce import allocator, poll_gently, shared_bytes

from runtime.batch import Segment, StepInput
from runtime.comm.experts import Symmetric
from runtime.comm.group import make_group
from runtime.comm.reduce import Room, SymmetricGroup
from runtime.comm.symm import SETS, Allocate, Buffers, Shape
from runtime.comm.waiting import Waiting
from runtime.decode import DecodeRunner, Drawn
from runtime.model.transformer import Transformer
from runtime.ops import ops_for
from runtime.rank import Rank
from runtime.tiny import tiny_config, write_checkpoint
from runtime.types import SamplingParams
from twin.policy.graphs import ladder
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

WORLD, MOST = 2, 4
Log = list[tuple[int, int]]
"""(rows, size) of every step that the runner took."""


class Logged(DecodeRunner):
    """A runner that remembers what it ran."""

    log: Log

    def run(self, segments: Sequence[Segment], size: int | None = None) -> Drawn:
        assert size is not None, "ranks that step together name the size"
        self.log.append((self.rows(segments), size))
        return super().run(segments, size)


def follow(rank_no: int, model: ModelSpec, plan: Plan, checkpoint: str,
           requests: list[tuple[list[int], SamplingParams]], maps: list[mmap.mmap],
           symm: bool = False) -> tuple[Served, Log, list[int]]:
    """One rank of the world: what it served, what its runner did, in how many parts."""
    poll_gently()
    log: Log = []
    halves: list[int] = []
    pool = plan.pools[0]

    def fit(rank: Rank) -> Rank:
        plain = rank.transformer
        rig = replace(plain.rig, ops=ops_for("triton"))
        if symm:
            waiting = Waiting(range(rank.at.world), 1e9, timed=False)
            allocate = exchange_allocator(maps[rank.at.world:], rank.at.local_rank)
            rig = replace(rig, experts=Symmetric(rank.groups.instance, rank.at, waiting, fp8=False, allocate=allocate))
        if rank.at.tp > 1:
            groups = [make_group(range(first, first + rank.at.tp), rank_no, 20) for first in range(0, rank.at.world, rank.at.tp)]
            ranks = slice(rank.at.dp_rank * rank.at.tp, (rank.at.dp_rank + 1) * rank.at.tp)
            rig = replace(rig, tp=SymmetricGroup(groups[rank.at.dp_rank], allocator(maps[ranks], rank.at.tp_rank),
                                                 Room(8, model.hidden * 4), rank.device,
                                                 Waiting(groups[rank.at.dp_rank].ranks, 1e9, timed=False)))
        transformer = Transformer(model, rank.at, plain.params, rig, rank.placement)
        runner = Logged(transformer, rank.kv, pool.block_tokens, most=MOST, max_context=32, sizes=ladder(MOST),
                        halve_from=pool.tbo_min_tokens if pool.tbo else None)
        runner.log = log
        hidden = transformer.hidden

        def spied(steps: Sequence[StepInput], kv: list[torch.Tensor], capacity: int) -> torch.Tensor:
            if isinstance(steps[0].logit_rows, slice):  # a step of the runner
                halves.append(len(steps))
            return hidden(steps, kv, capacity)

        transformer.hidden = spied  # type: ignore[method-assign]
        return replace(rank, decode=runner, transformer=transformer, experts=rig.experts)

    return serve(rank_no, model, plan, checkpoint, requests, fit), log, halves


def exchange_allocator(maps: list[mmap.mmap], index: int) -> Allocate:
    """The exchange's buffers in memory of all forked ranks."""
    def allocate(shape: Shape, device: torch.device) -> Buffers:
        memory, bases, keep = allocator(maps, index)(shape.total_bytes)
        return Buffers(shape, memory, bases, torch.zeros(SETS, dtype=torch.int32), keep)

    return allocate


def tiny(folder: Path) -> ModelSpec:
    config = tiny_config("deepseek_v3", hidden=64, layers=2, experts=4, top_k=2, vocab=64, context=64)
    write_checkpoint(folder, config, seed=5)
    return model_from_hf_config(config, "tiny")


def pool_of(**fields: object) -> PoolPlan:
    return PoolPlan(**{"role": "mixed", "comm": "ag_rs", "block_tokens": 4, "kv_blocks": 32, "max_num_seqs": 3,
                       "max_batch_tokens": 8, "chunk_tokens": 4, **fields})


def greedy(*lengths: int) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]


PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [11], [12, 13], [14, 15], [16]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks cannot share a CUDA context")
@pytest.mark.parametrize("symm", [pytest.param(False, marks=pytest.mark.slow), True], ids=["ag_rs", "symm"])
@pytest.mark.parametrize("cut", [
    pytest.param({"dp": 1, "tp": 2, "ep": 2}, marks=pytest.mark.slow), {"dp": 2, "ep": 2, "tbo": True, "tbo_min_tokens": 2},
    {"dp": 1, "tp": 2, "ep": 2, "tbo": True, "tbo_min_tokens": 3},
    pytest.param({"dp": 2, "tp": 2, "ep": 4, "tbo": True, "tbo_min_tokens": 2}, marks=pytest.mark.slow),
    pytest.param({"dp": 2, "tp": 2, "ep": 2}, marks=pytest.mark.slow)], ids=str)
def test_tensor_parallel_ranks_and_halves_give_the_same_tokens(tmp_path: Path, cut: dict[str, object], symm: bool) -> None:
    """Against one process; leaders of TP ranks schedule, their peers follow. With `symm` tokens travel to experts as they do
    between CUDA devices."""
    model = tiny(tmp_path / "model")
    requests = list(zip(PROMPTS[:4], greedy(5, 3, 4, 2), strict=True))
    pool = pool_of(**cut)
    args = (model, Plan(pools=(pool,)), str(tmp_path / "model"), requests)
    worlds = fork_world(pool.world, tmp_path, follow, *args, shared_bytes(2 * pool.world, 1 << 20), symm)
    alone = serve(0, model, Plan(pools=(pool_of(),)), str(tmp_path / "model"), requests).outputs
    found: dict[int, list[int]] = {}
    for served, _, _ in worlds:
        found |= served.outputs
    assert found == alone
    assert len({tuple(size for _, size in log) for _, log, _ in worlds}) == 1 and worlds[0][1], "all took steps of one size"
    halved = {size for (_, size), parts in zip(worlds[0][1], worlds[0][2], strict=True) if parts == 2}
    assert halved == {size for _, size in worlds[0][1] if pool.tbo and size >= pool.tbo_min_tokens}
    assert bool(halved) == pool.tbo


@pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks cannot share a CUDA context")
def test_all_ranks_take_graphs_of_one_size(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    plan = Plan(pools=(pool_of(dp=WORLD, ep=WORLD),))
    requests = list(zip(PROMPTS, greedy(6, 2, 2, 3, 2, 2), strict=True))  # rank 0 gets three, then long works alone; rank 1 three
    args = (model, plan, str(tmp_path / "model"), requests)
    worlds = fork_world(WORLD, tmp_path, follow, *args, [])
    plain = fork_world(WORLD, tmp_path, serve, *args)
    assert [served.outputs for served, _, _ in worlds] == [served.outputs for served in plain]
    assert [len(served.outputs) for served, _, _ in worlds] == [3, 3]
    (first, log, _), (_, other, _) = worlds
    assert [size for _, size in log] == [size for _, size in other], "every step in one size on all ranks"
    assert all(max(rows) <= size and -1 not in rows for rows, size in
               zip(zip(*([r for r, _ in one] for one in (log, other)), strict=True), (s for _, s in log), strict=True))
    assert any(rows == 0 for rows, _ in other), "an idle rank runs padding beside the other's decodes"
    assert len({size for _, size in log}) > 1
    assert max(record["round"] for record in first.records) > len(log), "steps with a prompt anywhere are plain everywhere"
