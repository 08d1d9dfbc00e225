"""How all-to-all libraries move tokens, as data: efficiencies and fixed latencies, each with where it was fitted.

The physics (bytes, hops, sharing) is never fitted; these few numbers are. Bandwidth is lost to headers, flow control
and to kernels that cannot issue copies faster (`nvlink_cap`), latency to notification, polling and barriers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from twin.spec.base import Source

Pattern = Literal["direct", "direct_copies", "rail", "rail_all"]
"""direct: one copy to every rank a token touches. direct_copies: one for each of its top-k experts. rail: one copy to the
same-rail GPU of every node it touches, forwarded over NVLink to the ranks there. rail_all: as rail, to everybody."""


@dataclass(frozen=True)
class Phase:
    """One direction. Rates are fractions of the link; `nvlink_cap` bounds a rank's NVLink bytes/s inside one domain,
    `forward_cap` when it forwards what came over the NIC; latencies are for a domain and what leaving it adds, and
    `row_bytes_per_s` what one token's row waits for itself, as a few warps carry it. Caps grow with `cap_power` of the link
    where it is faster than the one that they were measured on. `local` is the part of HBM's rate at which
    a rank packs and unpacks its copies, work of its own SMs that no overlap hides (0: the network's kernels do it). `served` says
    how many times as long it takes across domains in an engine as in the library's own tests, which rates were fitted on."""

    nvlink: float
    rdma: float
    nvlink_cap: float
    forward_cap: float
    base_s: float
    remote_s: float
    row_bytes_per_s: float = 1e15
    local: float = 0.0
    cap_power: float = 1.0
    served: float = 1.0


@dataclass(frozen=True)
class Slows:
    """How many times as long kernels take beside a library's own, which hold SMs and memory: dense products, attention, grouped
    experts, all others."""

    products: float
    attention: float
    experts: float
    others: float


ALONE = Slows(1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Protocol:
    """A library's dispatch and combine. Beside another half batch's compute (two-batch overlap) it takes `comm_sms` SMs, runs
    `beside` times as long and slows kernels as `slows` says; where that was never measured, by the SMs that it takes."""

    name: str
    pattern: Pattern
    dispatch: Phase
    combine: Phase
    comm_sms: int
    beside: float
    source: Source
    note: str
    slows: Slows | None = None

    @property
    def tested(self) -> Protocol:
        """The library by itself, as its own tests time it."""
        return replace(self, dispatch=replace(self.dispatch, served=1.0), combine=replace(self.combine, served=1.0))


_FAST = 1e15  # no cap
CAPPED_AT_BYTES_PER_S = 450e9
"""The NVLink on which caps were measured (H100, H200)."""
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (
    Protocol(
        "deepep_normal", "rail",
        # DeepEP test_intranode / test_internode on Hopper + CX7 400G, 4096 tokens x 7168, 20-24 SMs: 491 / 973 us on one
        # node gives 283 / 277 GB/s of NVLink; 749 / 1777 us on two 228 / 186 GB/s forwarded; 1791 / 3522 us on four
        # 45.6 / 45.0 GB/s of a 50 GB/s NIC; H800 153 / 158 GB/s (own traffic included) 0.67 of its NVLink.
        # B200 with 24 SMs: 440 us for 4096 tokens, 1393 us back for 8192, 1.13 and 1.43 times Hopper's speed on twice the link.
        Phase(nvlink=0.68, rdma=0.91, nvlink_cap=283e9, forward_cap=240e9, base_s=15e-6, remote_s=40e-6, cap_power=0.18,
              served=1.41),
        Phase(nvlink=0.70, rdma=0.90, nvlink_cap=277e9, forward_cap=190e9, base_s=15e-6, remote_s=40e-6, cap_power=0.52,
              served=1.12),
        # 16k tokens on 32 H100 take 7.2 / 14.3 ms in its test, in engines 10.5 / 15.7 without overlap, 10.8 / 15.0 and 9.5 / 17.2
        # with it (LMSYS, 2025-05): hence `served`, and nothing more beside another half's compute
        comm_sms=24, beside=1.0, source="calibrated",
        note="DeepEP V1 normal, published tables 1-4 nodes",
        # over what they take alone, in two traces of even loads (LMSYS, 2025-05; `benchmarks/published_left_out.py`); in those
        # of real ones products 1.43 and 1.77, attention 1.27 and 1.16, experts 1.0 and 0.98, others 1.24 and 1.22. 108 of 132 SMs
        # alone would be 1.22: experts lose less, as their power is what bounds them at full size
        slows=Slows(products=1.45, attention=1.34, experts=1.15, others=1.17)),
    Protocol(
        "deepep_low_latency", "direct_copies",
        # DeepEP test_low_latency on Hopper + CX7 400G, 8..256 tokens x 7168 top-8: the slope over tokens is 46-48 GB/s on
        # the NIC and 252 / 205 GB/s on NVLink, the intercept 14 / 10 us inside a node, 18-27 / 26 us across. One token of
        # 2048, 4096, 7168 elements takes 8.8 / 10.5, 9.6 / 11.4, 11.9 / 12.6 us. H800 (NVLink of 200 GB/s): 104 / 127 GB/s;
        # B200 (900): 496 / 613 GB/s, the link's part and no cap.
        Phase(nvlink=0.55, rdma=0.95, nvlink_cap=255e9, forward_cap=_FAST, base_s=7.2e-6, remote_s=6e-6,
              row_bytes_per_s=1.7e9, local=0.10, cap_power=2.0),
        Phase(nvlink=0.63, rdma=0.94, nvlink_cap=207e9, forward_cap=_FAST, base_s=8e-6, remote_s=12e-6,
              row_bytes_per_s=5.5e9, local=0.137, cap_power=2.0),
        # nothing but sending and receiving, 2 x 128 tokens on 72 H100: 59 / 76 us (LMSYS), hence `local`
        comm_sms=0, beside=1.0, source="calibrated",
        note="DeepEP V1 low latency, published tables 1-8 nodes"),
    Protocol(
        "nccl", "direct",
        # nccl-tests alltoall on 8 x H200: 512 MiB in 1.51 ms = 311 GB/s a GPU (0.69), 32 MiB in 124 us, 128 KiB in 9.9 us;
        # across nodes on CX7/EFA 45 GB/s of 50 at 64 MiB falling with size of the group.
        Phase(nvlink=0.69, rdma=0.80, nvlink_cap=_FAST, forward_cap=_FAST, base_s=20e-6, remote_s=30e-6),
        Phase(nvlink=0.69, rdma=0.80, nvlink_cap=_FAST, forward_cap=_FAST, base_s=20e-6, remote_s=30e-6),
        comm_sms=16, beside=1.3, source="calibrated",
        note="all_to_all with split sizes; base_s includes the exchange of counts"),
    Protocol(
        "symm", "direct",
        Phase(nvlink=0.75, rdma=0.80, nvlink_cap=_FAST, forward_cap=_FAST, base_s=10e-6, remote_s=30e-6),
        Phase(nvlink=0.75, rdma=0.80, nvlink_cap=_FAST, forward_cap=_FAST, base_s=10e-6, remote_s=30e-6),
        comm_sms=16, beside=1.3, source="assumed",
        note="one-sided pushes and a barrier; barrier measured at 10-12 us for 2-8 ranks"),
    Protocol(
        "ag_rs", "rail_all",
        # nccl-tests all_gather / reduce_scatter on 8 x H200: 512 MiB in 1.395 / 1.393 ms = 337 GB/s a GPU (0.75).
        Phase(nvlink=0.75, rdma=0.85, nvlink_cap=_FAST, forward_cap=_FAST, base_s=14e-6, remote_s=20e-6),
        Phase(nvlink=0.75, rdma=0.85, nvlink_cap=_FAST, forward_cap=_FAST, base_s=12e-6, remote_s=20e-6),
        comm_sms=16, beside=1.3, source="calibrated",
        note="every token to every rank, partial sums back"),
    Protocol(
        "gloo", "direct",
        Phase(nvlink=0.9, rdma=0.9, nvlink_cap=_FAST, forward_cap=_FAST, base_s=200e-6, remote_s=100e-6),
        Phase(nvlink=0.9, rdma=0.9, nvlink_cap=_FAST, forward_cap=_FAST, base_s=200e-6, remote_s=100e-6),
        comm_sms=0, beside=1.5, source="assumed",
        note="TCP on the host; calibrate"),
)}

# All-to-alls of other libraries that published times are compared with; no pool of a plan runs them.
LIBRARIES: dict[str, Protocol] = {protocol.name: protocol for protocol in (
    Protocol(
        "pplx", "direct_copies",
        # pplx-garden on H200 + CX7 400G: 128 tokens x 7168 top-8 on 8 / 16 / 32 ranks 50 / 110 / 154 us and 65 / 186 / 266 us
        # back, 4096 tokens 1.06 / 1.40 ms on 8 and 4.0 / 7.5 ms on 32: 210 and 300 GB/s of NVLink, 47 and 49 of the NIC.
        Phase(nvlink=0.8, rdma=0.94, nvlink_cap=210e9, forward_cap=_FAST, base_s=17e-6, remote_s=9e-6),
        Phase(nvlink=0.8, rdma=0.97, nvlink_cap=305e9, forward_cap=_FAST, base_s=22e-6, remote_s=6e-6),
        comm_sms=16, beside=1.3, source="calibrated", note="published for ConnectX-7"),
    Protocol(
        "pplx_efa", "direct_copies",
        # the same kernels over EFA (2 x 200G a GPU): 215 / 229 us and 242 / 335 us at 128 tokens, 4.6 / 8.3 ms at 4096
        Phase(nvlink=0.8, rdma=0.81, nvlink_cap=210e9, forward_cap=_FAST, base_s=17e-6, remote_s=78e-6),
        Phase(nvlink=0.8, rdma=0.88, nvlink_cap=305e9, forward_cap=_FAST, base_s=22e-6, remote_s=50e-6),
        comm_sms=16, beside=1.3, source="calibrated", note="published for EFA"),
)}

# Collectives of tensor parallelism on top of the graph's time: fraction of link rate and fixed seconds. nccl-tests and
# CUDA-graph replays on 8 x H200: all-reduce 128 KiB 21 us, 2 MiB 37 us, 32 MiB 197 us; 512 MiB 2.04 ms.
TP_EFFICIENCY, TP_BASE_S = 0.80, 6e-6
# Point-to-point KV transfer over RDMA: a GPU's bytes cross its link, and blocks scattered over its cache are posted and gathered
# one after the other, at KV_GATHER_BYTES_PER_S. Mooncake on 2 x 8 H800, 8 x 400G: 151 / 604 / 1208 / 4832 MB in 1.5 / 4.75 / 8.84
# / 31.65 ms, 19 of 50 GB/s a NIC and 0.5 ms; UCX and UCCL through NIXL 4 GiB in 0.36 s over 200G: 12 of 25 GB/s.
KV_LINK, KV_GATHER_BYTES_PER_S, KV_BASE_S = 0.90, 29e9, 0.5e-3
KV_EFFICIENCY = 1.0 / (1.0 / KV_LINK + 50e9 / KV_GATHER_BYTES_PER_S)
"""The part of a 400 Gb/s link that remains."""
