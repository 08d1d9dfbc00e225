"""Which labs there are, and which cases run in them: drawn from a seed, sized by the seconds that links need for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks.netlab.lab import LabSpec
from benchmarks.netlab.rank import ROW_BYTES
from twin.cost.network import Network

Op = Literal["all_to_all", "all_reduce", "all_gather", "none"]
Kind = Literal["all_to_all", "kv", "overlap", "all_reduce", "all_gather"]
Rows = npt.NDArray[np.int64]

_FLAT = LabSpec("one leaf", hosts=4, nic_delay_s=4e-3)
_SPINE = LabSpec("two leaves", hosts=6, leaf_ports=3, nic_delay_s=4e-3, hop_delay_s=1e-3)
_RAILS = LabSpec("two rails", hosts=3, ranks_per_host=2, nic_delay_s=4e-3)
_FAR = LabSpec("far leaves", hosts=4, leaf_ports=2, nic_delay_s=10e-3, hop_delay_s=5e-3)
LABS: tuple[tuple[LabSpec, ...], ...] = (
    tuple(replace(_FLAT, nic_bit_per_s=rate) for rate in (50e6, 100e6, 200e6)),
    tuple(replace(_SPINE, nic_bit_per_s=rate, oversubscription=over) for rate, over in ((50e6, 2.0), (100e6, 1.0), (100e6, 3.0))),
    tuple(replace(_RAILS, nic_bit_per_s=rate, nvlink_bit_per_s=nv, oversubscription=over)
          for rate, nv, over in ((50e6, 400e6, 1.0), (60e6, 200e6, 2.0), (100e6, 400e6, 2.0))),
    tuple(replace(_FAR, nic_bit_per_s=rate, oversubscription=over) for rate, over in ((50e6, 1.0), (100e6, 2.0))),
)
"""Labs that stand one after the other; the shapes of one differ in rates only."""


@dataclass(frozen=True)
class Move:
    """A KV transfer: `tokens` rows of `width` bytes in each of `layers`."""

    source: int
    target: int
    layers: int
    tokens: int
    width: int


@dataclass(frozen=True)
class Case:
    """One thing to time. `rows` are what each rank brings to a ring collective."""

    kind: Kind
    op: Op
    traffic_rows: tuple[tuple[int, ...], ...] = ()
    rows: int = 0
    kv: tuple[Move, ...] = ()

    def command(self) -> dict[str, Any]:
        """In the words of `benchmarks.netlab.rank`."""
        return {"op": self.op, "traffic_rows": self.traffic_rows, "rows": self.rows,
                "kv": [list(asdict(move).values()) for move in self.kv]}


def draw(spec: LabSpec, rng: np.random.Generator) -> list[Case]:
    """The cases of one shape: a long and a short one of each kind with traffic of its own, and ring collectives."""
    network = Network(spec.cluster())
    cases: list[Case] = []
    for seconds in (0.35, 0.06):
        cases.append(Case("all_to_all", "all_to_all", _tuples(_traffic(spec, network, seconds, rng))))
        cases.append(Case("kv", "none", kv=_moves(spec, network, seconds, rng)))
        cases.append(Case("overlap", "all_to_all", _tuples(_traffic(spec, network, seconds, rng)),
                          kv=_moves(spec, network, seconds, rng)))
    rate = float(network.capacity[network._nic_up])
    n, rows = spec.ranks, lambda seconds: max(1, int(seconds * rate / ROW_BYTES))
    cases.append(Case("all_reduce", "all_reduce", rows=rows(0.3 * n / (n - 1) / 2)))
    cases.append(Case("all_gather", "all_gather", rows=rows(0.3 / (n - 1))))
    cases.append(Case("all_to_all", "all_to_all", _tuples(np.ones((n, n), dtype=np.int64) - np.eye(n, dtype=np.int64))))
    return cases


def _traffic(spec: LabSpec, network: Network, seconds: float, rng: np.random.Generator) -> Rows:
    """Uneven rows [R, R], none to oneself and none between some pairs, that keep the fullest link busy for `seconds`."""
    n = spec.ranks
    popular = rng.dirichlet(np.full(n, 2.0), size=n) + 0.3 * rng.dirichlet(np.full(n, 1.0))
    traffic = popular * (rng.random((n, n)) > 0.1)
    np.fill_diagonal(traffic, 0.0)
    if not traffic.any():
        traffic[0, n - 1] = 1.0
    fullest_s = float((network.link_bytes(traffic * ROW_BYTES, range(n)) / network.capacity).max())
    return np.ceil(traffic * seconds / fullest_s).astype(np.int64)


def _moves(spec: LabSpec, network: Network, seconds: float, rng: np.random.Generator) -> tuple[Move, ...]:
    """One to three transfers of a few layers, from the first half of the ranks to the second; two may share a target."""
    n, layers, width = spec.ranks, int(rng.integers(1, 5)), 1024
    count = int(rng.integers(1, 4))
    moves = []
    for source in rng.choice(n // 2, size=min(count, n // 2), replace=False):
        target = int(rng.integers(n // 2, n))
        rate = float(network.capacity[list(network.route(int(source), target))].min())
        moves.append(Move(int(source), target, layers, max(1, int(seconds * rate / layers / width)), width))
    return tuple(moves)


def _tuples(rows: Rows) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(v) for v in row) for row in rows)


def shapes(labs: Sequence[Sequence[LabSpec]] = LABS) -> int:
    """How many shapes there are in all."""
    return sum(len(lab) for lab in labs)
