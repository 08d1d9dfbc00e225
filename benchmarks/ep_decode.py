"""Decode steps of ranks that share their experts through symmetric memory, whole steps in CUDA graphs and without.

    python -m benchmarks.ep_decode --share-gpu --ranks 8 --batch 16 --json out.json

A DeepSeek-shaped model (MLA, shared expert, grouped routing; fewer layers, random weights) is cut over the ranks as an engine
cuts it. All ranks take steps of one size: the last one runs padding alone, as an idle rank does. Seconds a step are the
device's, between events around each step, all ranks having met on the hosts before each run; the slowest rank counts, median
over steps. Tokens of both ways are compared: the same kernels, so the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
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
from benchmarks.timing import provenance
from runtime.batch import Segment
from runtime.comm.experts import make_expert_comm
from runtime.comm.group import make_group, solo
from runtime.comm.waiting import check_peers
from runtime.decode import DecodeRunner
from runtime.kv import make_kv
from runtime.layout import RankLayout
from runtime.model.transformer import Rig, Transformer
from runtime.mps import MpsUnavailable, share_gpu
from runtime.ops import ops_for
from runtime.tiny import tiny_config
from runtime.weights import load_weights
from twin.spec.hf import model_from_hf_config
from twin.spec.rundir import write_text

_BLOCK, _WARM, _PATIENCE_S = 64, 5, 400


@dataclass(frozen=True)
class Case:
    """`batch` sequences a rank of about `context` tokens; `rows` say how tokens travel to experts."""

    ranks: int
    batch: int
    context: int
    hidden: int
    layers: int
    experts: int
    top_k: int
    steps: int
    rows: str


def run_rank(rank: int, folder: str, case: Case) -> None:
    """Measure and leave `rank<r>.json`; nothing is left when anything failed."""
    try:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_grad_enabled(False)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
        write_text(Path(folder, f"rank{rank}.json"), json.dumps(measure(rank, case)))
        dist.barrier()  # memory that others may still address is not given up before
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def measure(rank: int, case: Case) -> dict[str, Any]:
    """Seconds of every step and the last tokens, with graphs and without."""
    config = tiny_config("deepseek_v3", hidden=case.hidden, layers=case.layers, experts=case.experts, top_k=case.top_k,
                         vocab=4096, context=case.context + 4 * (case.steps + _WARM) + _BLOCK)
    model = model_from_hf_config(config, "deepseek-shaped")
    at = RankLayout(rank, 0, "mixed", 0, 0, case.ranks, 1, case.ranks, rank, 0, case.experts)
    device = torch.device("cuda", torch.cuda.current_device())
    params = load_weights(model, at, checkpoint=None, seed=1, dtype=torch.bfloat16, device=device)
    comm = make_expert_comm("symm", make_group(range(case.ranks), rank, 120), at, device="cuda", fp8=case.rows == "fp8",
                            timeout_s=120.0)
    transformer = Transformer(model, at, params, Rig(ops_for("triton"), solo(rank), comm))
    each = -(-(case.context + case.steps + 2 * _WARM) // _BLOCK)
    kv = make_kv(model, at, case.batch * each, _BLOCK, torch.bfloat16, device)
    count = 0 if rank == case.ranks - 1 else case.batch
    segments = [Segment([(31 * rank + i) % 4096], case.context, range(i * each, (i + 1) * each)) for i in range(count)]
    found: dict[str, Any] = {"provenance": provenance(None)}
    for name in ("plain", "graph"):
        for cache in kv:
            cache.fill_(0.01)
        runner = DecodeRunner(transformer, kv, _BLOCK, most=case.batch, max_context=model.max_context, sizes=[case.batch])
        if name == "graph":
            runner.capture()
        drawn = runner.run(segments, case.batch)
        for _ in range(_WARM):
            drawn = runner.again(count) if count else runner.run([], case.batch)
        torch.cuda.synchronize()
        dist.barrier()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(case.steps + 1)]
        for mark in marks[:-1]:
            mark.record()
            drawn = runner.again(count) if count else runner.run([], case.batch)
        marks[-1].record()
        torch.cuda.synchronize()
        check_peers(comm)
        found[name] = {"step_s": [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)], "tokens": drawn.tokens.tolist()}
    return found


def summary(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest rank of each step; whether both ways ended with the same tokens."""
    out: dict[str, Any] = {**asdict(case), "same_tokens": all(r["plain"]["tokens"] == r["graph"]["tokens"] for r in ranks)}
    for name in ("plain", "graph"):
        slowest = sorted(map(max, zip(*(r[name]["step_s"] for r in ranks), strict=True)))
        out[name] = {"step_s": median(slowest), "step_s_p90": slowest[int(0.9 * len(slowest))], "steps": len(slowest)}
    return out


@click.command(help=__doc__)
@click.option("--ranks", default=8, show_default=True)
@click.option("--batch", default=16, show_default=True, help="Sequences a rank.")
@click.option("--context", default=1024, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--experts", default=64, show_default=True, help="Over all ranks.")
@click.option("--top-k", default=8, show_default=True)
@click.option("--steps", default=50, show_default=True)
@click.option("--rows", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True)
@click.option("--share-gpu", "share", is_flag=True, help="All ranks on the GPUs there are, through MPS.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(share: bool, out: Path | None, **fields: Any) -> None:
    case = Case(**fields)
    spawn = get_context("spawn")
    try:
        with share_gpu() if share else contextlib.nullcontext({}) as env, tempfile.TemporaryDirectory() as folder:
            os.environ.update({**env, "GLOO_SOCKET_IFNAME": "lo"})
            children = [spawn.Process(target=run_rank, args=(r, folder, case)) for r in range(case.ranks)]
            for child in children:
                child.start()
            for child in children:
                child.join(_PATIENCE_S)
                child.kill()
            written = [Path(folder, f"rank{r}.json") for r in range(case.ranks)]
            if not all(path.exists() for path in written):
                raise click.ClickException("a rank failed (see above)")
            ranks = [json.loads(path.read_text(encoding="utf-8")) for path in written]
    except MpsUnavailable as err:
        raise click.ClickException(str(err)) from err
    result = {"provenance": ranks[0]["provenance"] | {"method": __doc__}, "share_gpu": share, "case": summary(case, ranks)}
    print(json.dumps(result["case"], indent=1))
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
    if not result["case"]["same_tokens"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
