"""One rank of the exchange benchmark: checks with the oracle, captures graphs, times them, checks again."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from benchmarks.timing import measure_ceilings, provenance, time_graph
from runtime.comm.group import PeerLost
from runtime.comm.oracle import ROUTES, Traffic, apply_experts, mistakes, traffic
from runtime.comm.symm import SETS, Arrival, SymmExchange, over
from runtime.comm.waiting import Waiting

ROUNDS = 20
REPLAYS = 20
_INPUTS = 4  # rotated, so that rows do not lie in the cache from the last time
_LOST_AFTER_S = 0.5


@dataclass(frozen=True)
class Case:
    """`tokens` a rank; `rows` and `back` say how rows travel out and results back."""

    tokens: int
    hidden: int
    top_k: int
    experts: int
    rows: str
    back: str
    route: str


def run_rank(rank: int, ranks: int, folder: str, cases: list[Case], share: bool) -> None:
    """Measure all cases and leave `rank<r>.json` in the folder; nothing is left when anything failed."""
    try:
        devices = torch.cuda.device_count()
        if not share and devices < ranks:
            raise RuntimeError(f"{ranks} ranks need {ranks} GPUs; there are {devices} (--share-gpu lets them share)")
        torch.cuda.set_device(rank % devices)
        torch.set_grad_enabled(False)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        out: dict[str, Any] = {"provenance": provenance(None)}
        if rank == 0:
            out["ceilings"] = {**asdict(measure_ceilings()), "copy_bytes_per_s": copy_bytes_per_s()}
            torch.cuda.empty_cache()
        dist.barrier()
        out["cases"] = [Bench(rank, ranks, case).run() for case in cases]
        missed = name_the_lost(rank, ranks)
        out["cases"][-1]["mistakes"] += [missed] if missed else []
        partial = Path(folder, f"rank{rank}.tmp")
        partial.write_text(json.dumps(out), encoding="utf-8")
        partial.replace(Path(folder, f"rank{rank}.json"))
        dist.barrier()  # memory that others may still address is not given up before
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Bench:
    """One case on one rank."""

    def __init__(self, rank: int, ranks: int, case: Case) -> None:
        self.rank, self.ranks, self.case = rank, ranks, case
        self.slots_per_rank = case.experts // ranks
        self.exchange = SymmExchange(over(dist.group.WORLD), rank, Waiting(range(ranks), 30.0),
                                     slots_per_rank=self.slots_per_rank, fp8=case.rows == "fp8", push_back=case.back == "push")
        self.inputs = [self._traffic(case.tokens, case.route, 10 + i) for i in range(_INPUTS)]
        self.stream = torch.cuda.Stream()

    def run(self) -> dict[str, Any]:
        with torch.cuda.stream(self.stream):
            wrong = self.check(seed=1)
            rows = self._rows(self.inputs[:1])
            free, fresh = self.free_running(), self.fresh_entry()
            wrong += self.check(seed=2)
            self.stream.synchronize()
            self.exchange.waiting.check()
        return {"mistakes": wrong, "free_s": free, "fresh_s": fresh, "rows": rows[0], "rows_away": rows[1]}

    def check(self, seed: int) -> list[str]:
        """Every route with even, uneven and missing tokens, eagerly; then in a captured graph with other tokens."""
        case, found = self.case, []
        full = case.tokens
        counts = {"full": [full] * self.ranks, "one token": [1] + [0] * (self.ranks - 1),
                  "uneven": [(full * (7 * r + 3) // 11) % (full + 1) for r in range(self.ranks)]}
        for route in ROUTES:
            for name, tokens in counts.items():
                sent = self._traffic(tokens[self.rank], route, seed)
                wrong = mistakes(self.layer(sent, max(1, *tokens)), sent, case.experts)
                found += [f"rank {self.rank}, {route}, {name}: {wrong}"] if wrong else []
        static = self._traffic(full, "uniform", seed)
        graph, out = self._captured(lambda: self.layer(static, full))
        for again, route in enumerate(("uniform", "padded", "one rank")):
            sent = self._traffic(full, route, seed + 100 + again)
            for into, of in zip(vars(static).values(), vars(sent).values(), strict=True):
                into.copy_(of)
            graph.replay()
            wrong = mistakes(out, sent, case.experts)
            found += [f"rank {self.rank}, {route}, in a graph: {wrong}"] if wrong else []
        return found

    def layer(self, sent: Traffic, capacity: int) -> torch.Tensor:
        """Dispatch, the oracle's experts, combine."""
        arrival = self.exchange.dispatch(sent.x_TH, sent.slots_TK, sent.weights_TK, capacity)
        return self.exchange.combine(self._compute(arrival), arrival)

    def free_running(self) -> dict[str, float]:
        """Median seconds of each phase in a loop of its own."""
        arrivals = [self._dispatch(i) for i in range(SETS)]
        results = {a.which: self._compute(a) for a in arrivals}

        def combine(arrival: Arrival) -> torch.Tensor:
            return self.exchange.combine(results[arrival.which], arrival)

        phases = {"barrier": lambda i: self.exchange.meet(arrivals[i % SETS]), "dispatch": self._dispatch,
                  "pair": lambda i: combine(self._dispatch(i)), "combine": lambda i: combine(arrivals[i % SETS])}
        if self.case.rows == "fp8":
            phases["widen"] = lambda i: self.exchange.widen(arrivals[i % SETS])
        return {name: self._replays(phase) for name, phase in phases.items()}

    def fresh_entry(self) -> dict[str, list[float]]:
        """Seconds of each phase in each repetition, all ranks having met right before."""
        first = [self._dispatch(i) for i in range(SETS)]
        results = {a.which: self._compute(a) for a in first}
        stamps = torch.zeros(ROUNDS, 4, dtype=torch.int64, device="cuda")

        def rounds() -> None:
            for i in range(ROUNDS):
                self.exchange.meet(first[i % SETS])
                _stamp_kernel[(1,)](stamps[i, 0:])
                arrival = self._dispatch(i)
                _stamp_kernel[(1,)](stamps[i, 1:])
                self.exchange.meet(arrival)
                _stamp_kernel[(1,)](stamps[i, 2:])
                self.exchange.combine(results[arrival.which], arrival)
                _stamp_kernel[(1,)](stamps[i, 3:])

        graph, _ = self._captured(rounds)
        seen: dict[str, list[float]] = {"dispatch": [], "combine": []}
        for _ in range(REPLAYS):
            dist.barrier()
            graph.replay()
            t = stamps.tolist()
            seen["dispatch"] += [(row[1] - row[0]) / 1e9 for row in t]
            seen["combine"] += [(row[3] - row[2]) / 1e9 for row in t]
        return seen

    def _dispatch(self, i: int) -> Arrival:
        sent = self.inputs[i % _INPUTS]
        return self.exchange.dispatch(sent.x_TH, sent.slots_TK, sent.weights_TK, self.case.tokens)

    def _compute(self, arrival: Arrival) -> torch.Tensor:
        wide = self.exchange.widen(arrival)
        y_NH = apply_experts(wide.x_NH, arrival.slots_NK, arrival.weights_NK, self.rank * self.slots_per_rank,
                             self.case.experts)
        return y_NH if arrival.out_NH is None else arrival.out_NH.copy_(y_NH)

    def _replays(self, phase: Callable[[int], object]) -> float:
        graph, _ = self._captured(lambda: [phase(i) for i in range(ROUNDS)])
        seconds = []
        for _ in range(REPLAYS):
            dist.barrier()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / ROUNDS)
        return sorted(seconds)[REPLAYS // 2]

    def _captured(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of `work` and what it returned; it has run once before, and the graph twice."""
        work()
        self.stream.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            out = work()
        dist.barrier()
        for _ in range(2):
            graph.replay()
        self.stream.synchronize()
        return graph, out

    def _traffic(self, tokens: int, route: str, seed: int) -> Traffic:
        case = self.case
        return traffic(tokens, case.hidden, case.top_k, case.experts, self.ranks, route=route,
                       seed=1000 * seed + self.rank, dtype=torch.bfloat16, device="cuda")

    def _rows(self, inputs: list[Traffic]) -> tuple[int, int]:
        """(rows sent, rows sent to other ranks) of the first input: a row for each rank that a token chose."""
        rows = [{s // self.slots_per_rank for s in row if s >= 0} for row in inputs[0].slots_TK.tolist()]
        return sum(map(len, rows)), sum(len(row - {self.rank}) for row in rows)


def name_the_lost(rank: int, ranks: int) -> str:
    """The last rank stays away from a barrier: all others must soon say so. Empty when they did."""
    sent = traffic(1, 16, 1, ranks, ranks, route="uniform", seed=0, dtype=torch.bfloat16, device="cuda")
    for patience_s in (30.0, _LOST_AFTER_S):  # the first compiles, which may take long
        waiting = Waiting(range(ranks), patience_s)
        exchange = SymmExchange(over(dist.group.WORLD), rank, waiting, slots_per_rank=1)
        exchange.dispatch(sent.x_TH, sent.slots_TK, sent.weights_TK, 1)
        torch.cuda.synchronize()
        waiting.check()
    dist.barrier()
    began, wrong = time.monotonic(), ""
    if rank != ranks - 1:
        for _ in range(10):  # the first waits, the others must not
            exchange.dispatch(sent.x_TH, sent.slots_TK, sent.weights_TK, 1)
        torch.cuda.synchronize()
        try:
            waiting.check()
            wrong = "a rank that stayed away was not missed"
        except PeerLost as err:
            took_s = time.monotonic() - began
            if f"rank {ranks - 1} did" not in str(err) or not _LOST_AFTER_S <= took_s <= _LOST_AFTER_S + 0.5:
                wrong = f"{err}, after {took_s:.2f} s"
    dist.barrier()
    return f"rank {rank}, lost peer: {wrong}" if wrong else ""


def copy_bytes_per_s() -> float:
    """A copy of 2 GiB on the device, bytes read and written: the faster of the driver's own and a plain kernel."""
    a = torch.randint(0, 1 << 30, (1 << 29,), dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    ways = (lambda: b.copy_(a), lambda: _copy_kernel[(a.numel() // 4096,)](a, b, BLOCK=4096, num_warps=8))
    return 2 * a.numel() * 4 / min(time_graph([way]).median_s for way in ways)


@triton.jit
def _copy_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


@triton.jit
def _stamp_kernel(out):
    tl.store(out, globaltimer())
