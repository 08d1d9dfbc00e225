"""How evenly the runtime's own dispatch loads the ranks when every batch differs: executed tokens by rank, counted.

    python -m benchmarks.replica_split --loads loads.csv --json benchmarks/results/cpu_replica_split.json

A world of gloo ranks holds MoE layers and computes a prompt a rank and step, in the same code as when it serves, but that
in the gate's place each token draws its experts: by given loads, one row of a CSV a layer, a column an expert (lines that begin
with # are comments; without a file, lognormal ones). Experts are placed for these loads. Each step has fresh lognormal factors
on them, the same for all ranks (`noise`) and others for each rank (`own`), so that every batch loads experts in another way
than they were placed for. What arrives at a rank's experts is counted; max over mean of these counts, over all layers and
steps, stands beside what the same batches would have given had replicas shared alike (`even`), and the best split, which would
have to know all ranks' tokens (`best`). Without either noise batches differ by chance alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime.batch import Segment, make_step
from runtime.comm.experts import AllToAll
from runtime.comm.group import make_group, solo
from runtime.kv import make_kv
from runtime.layout import layouts
from runtime.model.transformer import Rig, Transformer
from runtime.ops import Router, TorchOps
from runtime.tiny import tiny_config
from runtime.weights import load_weights
from twin.policy.placement import Placement, max_over_mean, place_global, slots_to_ranks
from twin.policy.replica_split import even_split, split_over_replicas
from twin.spec.hf import model_from_hf_config
from twin.spec.model import ModelSpec, MoE
from twin.spec.plan import Plan, PoolPlan
from twin.spec.rundir import write_text

_LIMIT_S = 500


@dataclass(frozen=True)
class Case:
    """`loads` [layers][experts]; `noise` and `own` are sigmas of lognormal factors; `tokens` a rank and step."""

    loads: list[list[float]]
    ranks: int = 8
    redundant: int = 32
    top_k: int = 8
    tokens: int = 128
    steps: int = 10
    noise: float = 0.5
    own: float = 0.0
    seed: int = 0

    @property
    def model(self) -> ModelSpec:
        """As small as can be beside its experts."""
        config = tiny_config("qwen3_moe", hidden=32, layers=len(self.loads), experts=len(self.loads[0]), top_k=self.top_k,
                             vocab=512, context=2 * self.tokens)
        return model_from_hf_config(config, "replicas")

    @property
    def placement(self) -> Placement:
        return place_global(np.array(self.loads), len(self.loads[0]) + self.redundant, self.ranks)

    def step_loads(self, step: int, rank: int) -> np.ndarray:
        """What a rank's tokens follow in a step [layers, experts]."""
        load_LE = np.array(self.loads)
        common = np.random.default_rng([self.seed, step]).lognormal(0.0, self.noise, load_LE.shape)
        return load_LE * common * np.random.default_rng([self.seed, step, rank]).lognormal(0.0, self.own, load_LE.shape)


class Counted(AllToAll):
    """The all-to-all that counts what arrives for this rank's experts, call by call."""

    arrived: list[int]

    def begin_dispatch(self, *sent: Any) -> Any:
        coming = super().begin_dispatch(*sent)

        def wait() -> Any:
            came = coming()
            self.arrived.append(int((came.slots_NK >= 0).sum()))
            return came

        return wait


class Drawn(TorchOps):
    """Operators with a gate that draws: the choices of each layer in turn, by its loads."""

    def __init__(self, stream: np.random.Generator) -> None:
        self.stream, self.loads = stream, list[np.ndarray]()

    def route(self, x_TH: torch.Tensor, router: Router, moe: MoE, slots_T: torch.Tensor,
              load_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with np.errstate(divide="ignore"):  # an expert that nobody chooses
            logs_E = np.log(self.loads.pop(0))
        scores_TE = logs_E + self.stream.gumbel(size=(len(x_TH), moe.experts))
        ids = torch.from_numpy(np.argpartition(-scores_TE, moe.top_k, axis=1)[:, :moe.top_k])
        load_E += torch.bincount(ids.flatten(), minlength=moe.experts)
        return ids, torch.full(ids.shape, 1 / moe.top_k)


@torch.no_grad()
def run_rank(rank: int, case: Case) -> dict[str, Any]:
    """Of one rank, in a world that is up: tokens executed [steps][layers], and choices made [steps][layers][experts]."""
    model, placement = case.model, case.placement
    pool = PoolPlan(role="mixed", dp=case.ranks, ep=case.ranks, redundant_experts=case.redundant, block_tokens=16, comm="gloo")
    at = layouts(Plan(pools=(pool,)), model)[rank]
    rows = placement.slot_to_logical.tolist()
    cpu = torch.device("cpu")
    params = load_weights(model, at, checkpoint=None, seed=case.seed, dtype=torch.float32, device=cpu, placement=rows)
    comm = Counted(make_group(range(case.ranks), rank, 60), at)
    draws = np.random.default_rng([case.seed, 1, rank])
    ops = Drawn(draws)
    transformer = Transformer(model, at, params, Rig(ops, solo(rank), comm), rows)
    kv = make_kv(model, at, -(-case.tokens // 16), 16, torch.float32, cpu)
    executed, chosen = [], []
    for step in range(case.steps):
        for ffn in transformer.moe_layers:
            ffn.load_E.zero_()
        ops.loads, comm.arrived = list(case.step_loads(step, rank)), []
        prompt = Segment(draws.integers(0, model.vocab, case.tokens).tolist(), 0, range(len(kv[0])), is_prefill=True)
        transformer.forward(make_step([prompt], 16), kv, case.tokens)
        executed.append(list(comm.arrived))
        chosen.append([ffn.load_E.tolist() for ffn in transformer.moe_layers])
    return {"executed": executed, "chosen": chosen}


def figures_of(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Max over mean of what ranks executed, and of two other splits of the same batches. Raises ValueError for lost tokens."""
    executed_SLR = np.array([rank["executed"] for rank in ranks]).transpose(1, 2, 0)
    chosen_SLE = np.sum([rank["chosen"] for rank in ranks], 0)
    if not np.array_equal(executed_SLR.sum(2), chosen_SLE.sum(2)) or \
            not (chosen_SLE.sum(2) == case.ranks * case.tokens * case.top_k).all():
        raise ValueError("what was executed is not what was chosen")
    placement = case.placement
    other = {"even": even_split, "best": split_over_replicas}
    found = {"runtime": max_over_mean(executed_SLR.reshape(-1, case.ranks))}
    for name, split in other.items():
        found[name] = np.concatenate([max_over_mean(slots_to_ranks(split(chosen_LE, placement), placement))
                                      for chosen_LE in chosen_SLE])
    return {name: {"mean": float(values.mean()), "p95": float(np.quantile(values, 0.95)), "most": float(values.max())}
            for name, values in found.items()}


def _child(rank: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks,
                            timeout=timedelta(seconds=_LIMIT_S))
    write_text(Path(folder, f"rank{rank}.json"), json.dumps(run_rank(rank, case)))
    dist.barrier()


def measure(case: Case) -> dict[str, Any]:
    """Figures of one case, in processes of its own."""
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="replicas-") as folder, _loopback():
        children = [spawn.Process(target=_child, args=(rank, case, folder)) for rank in range(case.ranks)]
        for child in children:
            child.start()
        for child in children:
            child.join(_LIMIT_S)
            child.kill()
        return figures_of(case, [json.loads(Path(folder, f"rank{r}.json").read_text()) for r in range(case.ranks)])


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME")
        if before is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = before


def read_loads(path: Path | None, layers: int) -> list[list[float]]:
    """Rows of a file, evenly spaced over it, or lognormal ones."""
    if path is None:
        return np.random.default_rng(1).lognormal(0.0, 0.9, (layers, 256)).tolist()
    rows = np.atleast_2d(np.loadtxt(path, delimiter=",", comments="#"))
    return rows[np.linspace(0, len(rows) - 1, min(layers, len(rows))).astype(int)].tolist()


@click.command(help=__doc__)
@click.option("--loads", "path", type=click.Path(exists=True, path_type=Path), help="CSV: a row a layer, a column an expert.")
@click.option("--layers", default=4, show_default=True, help="Layers taken, evenly spaced over the file's.")
@click.option("--ranks", default=8, show_default=True)
@click.option("--redundant", default=32, show_default=True, help="Redundant experts.")
@click.option("--tokens", multiple=True, default=(8, 32, 128), show_default=True, help="A rank and step; may be repeated.")
@click.option("--noise", multiple=True, default=(0.0, 0.5), show_default=True, help="Sigma of all's factors; may be repeated.")
@click.option("--own", default=0.0, show_default=True, help="Sigma of each rank's own factors.")
@click.option("--steps", default=10, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here.")
def main(path: Path | None, layers: int, ranks: int, redundant: int, tokens: tuple[int, ...], noise: tuple[float, ...],
         own: float, steps: int, out: Path | None) -> None:
    loads = read_loads(path, layers)
    found = []
    for n in tokens:
        for sigma in noise:
            case = Case(loads, ranks=ranks, redundant=redundant, tokens=n, steps=steps, noise=sigma, own=own)
            found.append({k: v for k, v in asdict(case).items() if k != "loads"} | {"max_over_mean": measure(case)})
            print(json.dumps(found[-1]), flush=True)
    result = {"method": __doc__, "loads": path.name if path else "lognormal", "layers": len(loads), "experts": len(loads[0]),
              "cases": found}
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
