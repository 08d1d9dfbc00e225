"""Decode steps of ranks that share their experts through symmetric memory, whole steps in CUDA graphs and without.

    python -m benchmarks.ep_decode --share-gpu --ranks 8 --batch 16 --budget 110 --json out.json
    python -m benchmarks.ep_decode --share-gpu --ranks 8 --tp 2 --tbo --batch 16 --json out.json
    python -m benchmarks.ep_decode --ranks 2 --tp 2 --tbo --json out.json        # a GPU each: NCCL as well

A DeepSeek-shaped model (MLA, shared expert, grouped routing; fewer layers, random weights) is cut over the ranks as an engine
cuts it. All ranks take steps of one size: the last DP rank (if there are two) runs padding alone, as an idle one does. Seconds
a step are the device's, between events around each step, all ranks having met on the hosts before each run; the slowest rank
counts, median over steps. Ways: `plain` without graphs, `graph`, with --tbo `graph_tbo` (captured in two halves that overlap),
and where every rank has a GPU of its own `nccl` (no graph, NCCL for experts and TP). With --share-gpu plain steps are not timed
unless --ways asks for it: `eager` is one such step, whose tokens the first step of the graph must give. Tokens of plain and graph
must be the same: the same kernels, so the same numbers; of the others the share that is the same is told. With --tp also sums
[batch, hidden] of TP ranks alone: checked to the last bit against the sum in the order of ranks, then timed in a graph of fifty,
beside NCCL's. Stages are told on stderr as rank 0 comes to them; at the end of --budget, where every rank is.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.stages import Stages, wait_for
from benchmarks.timing import provenance
from runtime.batch import Segment
from runtime.comm.experts import make_expert_comm
from runtime.comm.group import Group, TensorGroup, make_group
from runtime.comm.symm import SETS
from runtime.comm.waiting import Waiting, check_peers, waiting_of
from runtime.compiles import compiles
from runtime.decode import DecodeRunner
from runtime.kv import make_kv
from runtime.layout import RankLayout
from runtime.model.transformer import Rig, Transformer
from runtime.mps import MpsUnavailable, share_gpu
from runtime.ops import ops_for
from runtime.options import EngineOptions
from runtime.rank import tensor_group
from runtime.tiny import tiny_config
from runtime.weights import load_weights
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec
from twin.spec.plan import PoolPlan
from twin.spec.rundir import write_text

_BLOCK, _WARM, _REPLAYS = 64, 5, 5
_WAYS = ("plain", "graph", "graph_tbo", "nccl")
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """`batch` sequences a DP rank of about `context` tokens; `rows` say how tokens travel to experts."""

    ranks: int
    batch: int
    context: int
    hidden: int
    layers: int
    experts: int
    top_k: int
    steps: int
    rows: str
    tp: int = 1
    tbo: bool = False
    chosen: tuple[str, ...] = ()

    @property
    def dp(self) -> int:
        return self.ranks // self.tp

    def ways(self, *, own_gpus: bool) -> list[str]:
        """In order. What graphs are checked against, a plain step at least, comes first."""
        there = ["plain", "graph", *(["graph_tbo"] if self.tbo else []), *(["nccl"] if own_gpus else [])]
        if not set(self.chosen) <= set(there):
            raise ValueError(f"there is no way {', '.join(sorted(set(self.chosen) - set(there)))} here: graph_tbo needs --tbo, "
                             "nccl a GPU a rank")
        chosen = self.chosen or (there if own_gpus else there[1:])
        found = [way for way in there if way in chosen]
        return found if "plain" in found else ["eager", *found]


def run_rank(rank: int, folder: str, case: Case, began: float, budget_s: float) -> None:
    """Measure and leave `rank<r>.json`, which grows way by way."""
    try:
        stages = Stages(folder, rank, began, budget_s)
        stages.end_in_time()
        compiles.listen()
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_grad_enabled(False)
        if torch.cuda.device_count() < case.ranks:  # ranks that share a GPU share the processors as well
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // case.ranks))
        torch.zeros(1, device="cuda")
        stages("on the device")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
        dist.barrier()
        stages("all met")
        measure(rank, case, stages, lambda found: write_text(Path(folder, f"rank{rank}.json"), json.dumps(found)))
        dist.barrier()  # memory that others may still address is not given up before
        stages.ended()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def shape_of(case: Case) -> ModelSpec:
    """DeepSeek-V3's attention with fewer heads, fewer layers and experts."""
    config = tiny_config("deepseek_v3", hidden=case.hidden, layers=case.layers, experts=case.experts, top_k=case.top_k,
                         vocab=4096, context=case.context + 4 * (case.steps + _WARM) + _BLOCK)
    config |= {"num_attention_heads": 32, "num_key_value_heads": 32, "q_lora_rank": 1536, "kv_lora_rank": 512,
               "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    return model_from_hf_config(config, "deepseek-shaped")


def meetings(waiting: Waiting, device: torch.device) -> Callable[[], str]:
    """Says how many barriers of each set of the exchange's buffers this rank's device has come to, while it waits in one."""
    stream, seen = torch.cuda.Stream(), torch.full((SETS,), -1, dtype=torch.int32, pin_memory=True)

    def look() -> str:
        if waiting.memory:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                seen.copy_(waiting.memory[-1].turns, non_blocking=True)
            time.sleep(0.5)  # it may never come to it
        return f"at meetings {seen.tolist()}"

    return look


def measure(rank: int, case: Case, stages: Stages, keep: Keep) -> dict[str, Any]:
    """Seconds of every step and the last tokens of every way; sums of TP ranks. `keep` is given all so far after each."""
    model = shape_of(case)
    at = RankLayout(rank, 0, "mixed", 0, 0, case.dp, case.tp, case.ranks, rank // case.tp, rank % case.tp, case.experts)
    device = torch.device("cuda", torch.cuda.current_device())
    own_gpus = torch.cuda.device_count() >= case.ranks
    backend = "nccl" if own_gpus else "gloo"
    everyone = make_group(range(case.ranks), rank, 120, backend)
    tps = [make_group(range(first, first + case.tp), rank, 120, backend) for first in range(0, case.ranks, case.tp)]
    pool = PoolPlan(role="mixed", dp=case.dp, tp=case.tp, ep=case.ranks, comm="symm")
    options = EngineOptions(device="cuda", backend="triton", dtype="bf16")
    stages("groups made")
    whole = tensor_group(model, pool, tps[at.dp_rank], options, device, case.batch)
    params = load_weights(model, at, checkpoint=None, seed=1, dtype=torch.bfloat16, device=device)
    torch.cuda.synchronize()
    stages("weights made")
    comm = make_expert_comm("symm", everyone, at, device="cuda", fp8=case.rows == "fp8", timeout_s=120.0)
    for waiting in waiting_of([comm]):  # none in a world of one
        stages.look = meetings(waiting, device)
    ops = ops_for("triton")
    each = -(-(case.context + case.steps + 2 * _WARM) // _BLOCK)
    kv = make_kv(model, at, case.batch * each, _BLOCK, torch.bfloat16, device)
    count = 0 if case.dp > 1 and at.dp_rank == case.dp - 1 else case.batch
    segments = [Segment([(31 * at.dp_rank + i) % 4096], case.context, range(i * each, (i + 1) * each)) for i in range(count)]
    found: dict[str, Any] = {"provenance": provenance(None) if rank == 0 else {}, "card": torch.cuda.get_device_name(),
                             "own_gpus": own_gpus}
    for name in case.ways(own_gpus=own_gpus):
        for cache in kv:
            cache.fill_(0.01)
        rig = Rig(ops, tps[at.dp_rank], make_expert_comm("nccl", everyone, at)) if name == "nccl" else Rig(ops, whole, comm)
        transformer = Transformer(model, at, params, rig)
        runner = DecodeRunner(transformer, kv, _BLOCK, most=case.batch, max_context=model.max_context, sizes=[case.batch],
                              halve_from=0 if name == "graph_tbo" else None)
        if name.startswith("graph"):
            stages(f"{name}: capture")
            runner.capture()
        found[name] = time_steps(runner, segments, case, lambda stage, name=name: stages(f"{name}: {stage}"),
                                 steps=0 if name == "eager" else case.steps)
        check_peers(comm, whole)
        keep(found)
    if case.tp > 1:
        stages("sums")
        found["sums"] = sums(whole, tps[at.dp_rank], case, device)
        check_peers(whole)
        keep(found)
    return found


def time_steps(runner: DecodeRunner, segments: list[Segment], case: Case, stages: Callable[[str], None],
               steps: int) -> dict[str, Any]:
    """Seconds of every step, and the tokens of the first and the last; without `steps` a first one alone."""
    count = len(segments)
    step = lambda: runner.again(count) if count else runner.run([], case.batch)  # noqa: E731
    stages("first step")
    drawn = runner.run(segments, case.batch)
    stages(f"first step queued, {compiles.total} kernels compiled so far")
    first = drawn.tokens.tolist()  # before steps of their own tokens part ways at a near tie
    if not steps:
        return {"first": first}
    stages("steps")
    for _ in range(_WARM):
        drawn = step()
    torch.cuda.synchronize()
    dist.barrier()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for mark in marks[:-1]:
        mark.record()
        drawn = step()
    marks[-1].record()
    torch.cuda.synchronize()
    return {"step_s": [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)], "tokens": drawn.tokens.tolist(), "first": first}


def sums(symm: TensorGroup, plain: Group, case: Case, device: torch.device) -> dict[str, Any]:
    """Whether sums are right to the last bit, and seconds each takes in a graph."""
    stream = torch.Generator(device).manual_seed(7)
    right = True
    for i in range(20):
        rows = 1 + (i * 37) % case.batch
        parts = torch.randn(case.tp, rows, case.hidden, generator=stream, device=device).to(torch.bfloat16)
        want = torch.zeros(rows, case.hidden, device=device)
        for part in parts:
            want += part.float()
        right &= torch.equal(symm.all_reduce(parts[symm.index].clone()), want.to(torch.bfloat16))
        right &= torch.equal(symm.all_gather(parts[symm.index].clone()), parts)
    found = {"right": right, "bytes": case.batch * case.hidden * 2, "symm_s": _graph_s(symm, case, device)}
    if dist.get_backend(plain.pg) == "nccl":
        found["nccl_s"] = _graph_s(plain, case, device)
    return found


def _graph_s(group: TensorGroup, case: Case, device: torch.device) -> float:
    """Median seconds of a sum among fifty in a graph."""
    x = torch.zeros(case.batch, case.hidden, dtype=torch.bfloat16, device=device)
    group.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(50):
            group.all_reduce(x)
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # ranks meet on the device before those that count, which outlast a host that comes late
        begin.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / 50 / _REPLAYS)
    return median(seconds)


def summary(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest rank of each step; whether graph and plain ended with the same tokens (or began, where one plain step was
    taken alone), and which share of others'. Of the ways that all ranks have."""
    ways = [way for way in _WAYS if all(way in rank for rank in ranks)]
    against, which = ("plain", "tokens") if "plain" in ways else ("eager", "first")
    fields = {name: value for name, value in asdict(case).items() if name != "chosen"}
    out: dict[str, Any] = {**fields, "same_tokens": "graph" not in ways or all(
        r[against][which] == r["graph"][which] for r in ranks)}
    if against == "eager":
        out["same_tokens_of"] = "first steps"

    def share(way: str, which: str) -> float:
        pairs = [(a, b) for r in ranks for a, b in zip(r[way][which], r[against][which], strict=True)]
        return round(sum(a == b for a, b in pairs) / max(1, len(pairs)), 4)

    for name in ways:
        slowest = sorted(map(max, zip(*(r[name]["step_s"] for r in ranks), strict=True)))
        out[name] = {"step_s": median(slowest), "step_s_p90": slowest[int(0.9 * len(slowest))], "steps": len(slowest),
                     **({"same_tokens_share": share(name, "tokens")} if against == "plain" else {}),
                     "same_first_tokens_share": share(name, "first")}
    if all("sums" in rank for rank in ranks):
        out["sums"] = {"right": all(r["sums"]["right"] for r in ranks), "bytes": ranks[0]["sums"]["bytes"],
                       **{key: max(r["sums"][key] for r in ranks) for key in ("symm_s", "nccl_s") if key in ranks[0]["sums"]}}
    return out


def run_ranks(case: Case, env: dict[str, str], budget_s: float, began: float) -> tuple[list[dict[str, Any]], list[str]]:
    """What every rank has left, in order (nothing unless all have left something), and what went wrong."""
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({**env, "GLOO_SOCKET_IFNAME": "lo"})
        children = [spawn.Process(target=run_rank, args=(r, folder, case, began, budget_s)) for r in range(case.ranks)]
        for child in children:
            child.start()
        wrong = wait_for(children, folder, began, budget_s)
        written = [Path(folder, f"rank{r}.json") for r in range(case.ranks)]
        there = all(path.exists() for path in written)
        return [json.loads(path.read_text(encoding="utf-8")) for path in written] if there else [], wrong


def conclude(case: Case, ranks: list[dict[str, Any]], wrong: list[str], share: bool, out: Path | None) -> bool:
    """Tell and write what was measured, be it a part; whether all of it was, and right."""
    if wrong:
        click.echo("\n".join(wrong), err=True)
    if not ranks:
        return False
    told = summary(case, ranks)
    result = {"provenance": ranks[0]["provenance"] | {"method": __doc__}, "share_gpu": share, "card": ranks[0]["card"],
              "own_gpus": ranks[0]["own_gpus"], "case": told, **({"cut_off": wrong} if wrong else {})}
    print(json.dumps(told, indent=1))
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
    return not wrong and told["same_tokens"] and told.get("sums", {"right": True})["right"]


@click.command(help=__doc__)
@click.option("--ranks", default=8, show_default=True)
@click.option("--tp", default=1, show_default=True, help="TP ranks of a DP rank; experts are spread over all ranks.")
@click.option("--tbo", is_flag=True, help="Also steps in two halves that overlap, in a graph.")
@click.option("--batch", default=16, show_default=True, help="Sequences a DP rank.")
@click.option("--context", default=1024, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--experts", default=64, show_default=True, help="Over all ranks.")
@click.option("--top-k", default=8, show_default=True)
@click.option("--steps", default=50, show_default=True)
@click.option("--rows", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True)
@click.option("--ways", "chosen", multiple=True, type=click.Choice(_WAYS), help="These alone. May be repeated.")
@click.option("--budget", "budget_s", default=400.0, show_default=True, help="Seconds after which it ends, and says where.")
@click.option("--share-gpu", "share", is_flag=True, help="All ranks on the GPUs there are, through MPS.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(share: bool, out: Path | None, budget_s: float, **fields: Any) -> None:
    case, began = Case(**fields), time.monotonic()
    if case.ranks % case.tp:
        raise click.BadParameter(f"{case.tp} does not divide {case.ranks} ranks", param_hint="--tp")
    try:
        with share_gpu() if share else contextlib.nullcontext({}) as env:
            well = conclude(case, *run_ranks(case, env, budget_s, began), share, out)  # before the service ends: that may fail
    except MpsUnavailable as err:
        raise click.ClickException(str(err)) from err
    if not well:
        sys.exit(1)


if __name__ == "__main__":
    main()
