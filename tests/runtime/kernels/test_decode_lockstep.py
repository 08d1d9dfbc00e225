"""Ranks whose experts are spread take decode steps of one size together: idle ones with padding alone, and all of them plain
steps as soon as one has a prompt. The runner computes its steps without graphs here; when and in which size is the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_worlds import Served, fork_world, serve

from runtime.batch import Segment
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
           requests: list[tuple[list[int], SamplingParams]]) -> tuple[Served, Log]:
    """One rank of the world: what it served, what its runner did."""
    log: Log = []

    def fit(rank: Rank) -> Rank:
        plain = rank.transformer
        transformer = Transformer(model, rank.at, plain.params, replace(plain.rig, ops=ops_for("triton")), rank.placement)
        runner = Logged(transformer, rank.kv, plan.pools[0].block_tokens, most=MOST, max_context=32, sizes=ladder(MOST))
        runner.log = log
        return replace(rank, decode=runner, transformer=transformer)

    return serve(rank_no, model, plan, checkpoint, requests, fit), log


@pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks cannot share a CUDA context")
def test_all_ranks_take_graphs_of_one_size(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3", hidden=64, layers=2, experts=8, top_k=2, vocab=64, context=64)
    write_checkpoint(tmp_path / "model", config, seed=5)
    model = model_from_hf_config(config, "tiny")
    pool = PoolPlan(role="mixed", dp=WORLD, ep=WORLD, comm="ag_rs", block_tokens=4, kv_blocks=32, max_num_seqs=3,
                    max_batch_tokens=8, chunk_tokens=4)
    plan = Plan(pools=(pool,))
    greedy = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 3, 2, 3, 2, 2)]
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13], [14, 15], [16]]
    requests = list(zip(prompts, greedy, strict=True))  # rank 0 gets three, then long works alone; rank 1 three
    args = (model, plan, str(tmp_path / "model"), requests)
    worlds = fork_world(WORLD, tmp_path, follow, *args)
    plain = fork_world(WORLD, tmp_path, serve, *args)
    assert [served.outputs for served, _ in worlds] == [served.outputs for served in plain]
    assert [len(served.outputs) for served, _ in worlds] == [3, 3]
    (first, log), (_, other) = worlds
    assert [size for _, size in log] == [size for _, size in other], "every step in one size on all ranks"
    assert all(max(rows) <= size and -1 not in rows for rows, size in
               zip(zip(*([r for r, _ in one] for one in (log, other)), strict=True), (s for _, s in log), strict=True))
    assert any(rows == 0 for rows, _ in other), "an idle rank runs padding beside the other's decodes"
    assert len({size for _, size in log}) > 1
    assert max(record["round"] for record in first.records) > len(log), "steps with a prompt anywhere are plain everywhere"
