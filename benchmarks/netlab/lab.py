"""The lab: one namespace a rank, a leaf or spine, joined by shaped links, as a ClusterSpec describes them.

Ranks of a host (an NVLink domain) meet at an `nv` namespace; every rank's NIC goes to its leaf, leaves go to the spine.
Which leaf a NIC goes to is asked of the twin's own Network, so lab and prediction speak of one geometry. Links without
delay are veth pairs, links with delay are pairs of tunnel devices with a delay line between (kernels often lack netem).
Every egress has the rate of its link (tc htb), shared evenly by the connections that cross it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from twin.cost.network import Network
from twin.spec.cluster import ClusterSpec, GpuSpec, NetworkSpec, NodeGroup

PREFIX = "eptnetlab-"
MTU = 9000
BURST_BYTES = 2 * (MTU + 14)
"""Depth of every bucket: one packet to send and one to be late by."""
MARK = 0x20
"""Type of service of a rank's second connections (KV); what has none is a collective's."""
_QUEUE_BYTES = 16 << 20
_ROOT = Path(__file__).resolve().parents[2]
_TCP = {"net.ipv4.tcp_congestion_control": "reno", "net.ipv4.tcp_slow_start_after_idle": "0",
        "net.ipv4.tcp_no_metrics_save": "1", "net.ipv4.ip_forward": "1", "net.ipv4.conf.all.rp_filter": "0",
        "net.ipv4.conf.default.rp_filter": "0", "net.ipv6.conf.all.disable_ipv6": "1",
        "net.ipv6.conf.default.disable_ipv6": "1"}


class LabError(RuntimeError):
    """The lab cannot be built on this machine; the message says why."""


@dataclass(frozen=True)
class LabSpec:
    """`hosts` of `ranks_per_host` ranks. Rates in bits/s; `nic_delay_s` is one way over a NIC at either end (half of it on
    each rank's link), `hop_delay_s` one way over one leaf-spine link. `window_bytes` bounds what a connection may have under
    way, so that nothing is ever dropped."""

    name: str
    hosts: int
    ranks_per_host: int = 1
    nic_bit_per_s: float = 100e6
    nvlink_bit_per_s: float = 800e6
    leaf_ports: int = 32
    oversubscription: float = 1.0
    nic_delay_s: float = 0.0
    hop_delay_s: float = 0.0
    window_bytes: int = 4 << 20

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def delayed(self) -> bool:
        return self.nic_delay_s > 0 or self.hop_delay_s > 0

    @property
    def wire_share(self) -> float:
        """Payload bytes per byte that the buckets count: TCP with timestamps over IPv4, and Ethernet's header on veth."""
        return (MTU - 20 - 32) / (MTU + (0 if self.delayed else 14))

    def cluster(self) -> ClusterSpec:
        """The same network in the twin's words; rates are what payload can use of them."""
        share = self.wire_share / 8
        cpu = GpuSpec(name="cpu", kind="cpu", hbm_bytes=8e9, hbm_bytes_per_s=2e10, bf16_flop_per_s=1e11,
                      fp32_flop_per_s=1e11)
        network = NetworkSpec(
            nvlink_bytes_per_s=self.nvlink_bit_per_s * (MTU - 52) / (MTU + 14) / 8, nvlink_latency_s=0.0,
            nvlink_domain_gpus=self.ranks_per_host, nics_per_node=self.ranks_per_host,
            nic_bytes_per_s=self.nic_bit_per_s * share, nic_latency_s=self.nic_delay_s, pcie_bytes_per_s=1e12,
            rails=self.ranks_per_host > 1, leaf_ports=self.leaf_ports, oversubscription=self.oversubscription,
            switch_latency_s=self.hop_delay_s)
        return ClusterSpec(name=f"netlab {self.name}", network=network,
                           groups=(NodeGroup(nodes=self.hosts, gpus_per_node=self.ranks_per_host, gpu=cpu),))


@dataclass(frozen=True)
class Port:
    """One end of a link: a device in a namespace."""

    namespace: str
    device: str
    address: str


@dataclass(frozen=True)
class Cable:
    """Both ends, how long bytes take, and what kind of link it is ("nic", "uplink" or "nvlink")."""

    kind: str
    leaf: int
    near: Port
    far: Port


def require() -> None:
    """Raises LabError where namespaces and shaped links cannot be made."""
    if os.geteuid() != 0:
        raise LabError("netlab makes network namespaces and needs root")
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise LabError("netlab needs the commands ip and tc (package iproute2)")
    probe = f"{PREFIX}probe"
    _run(["ip", "netns", "del", probe], check=False)
    try:
        _run(["ip", "netns", "add", probe])
        _run(["ip", "-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1"])
        _batch(probe, shaping("v0", 1e8, [(0, 1)]))
    finally:
        _run(["ip", "netns", "del", probe], check=False)


@contextmanager
def alone() -> Iterator[None]:
    """Hold the machine's one lab. Raises LabError while another process does."""
    with Path(f"/run/{PREFIX}lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError("another netlab stands on this machine") from None
        yield


def remove_all() -> None:
    """Delete every namespace that has the lab's prefix, with its links."""
    listed = _run(["ip", "netns", "list"], check=False).split("\n")
    for name in sorted(line.split()[0] for line in listed if line.startswith(PREFIX)):
        _run(["ip", "netns", "del", name], check=False)


class Lab:
    """A lab that stands. `spec` may be reshaped (rates, oversubscription) while it does."""

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        self.network = Network(spec.cluster())
        self.leaves = sorted({int(leaf) for leaf in self.network.leaf_of})
        self.cables = tuple(_cables(spec, self.network))

    @property
    def namespaces(self) -> list[str]:
        names = [rank_namespace(i) for i in range(self.spec.ranks)]
        names += [f"{PREFIX}leaf{leaf}" for leaf in self.leaves]
        if self.spec.ranks_per_host > 1:
            names += [f"{PREFIX}nv{host}" for host in range(self.spec.hosts)]
        return [*names, f"{PREFIX}spine"]

    def build(self) -> None:
        """Namespaces and veth links; delayed links are made by the delay line, which must run before `wire`."""
        for name in self.namespaces:
            _run(["ip", "netns", "add", name])
            _run(["ip", "-n", name, "link", "set", "lo", "up"])
            window = str(self.spec.window_bytes)
            settings = _TCP | {"net.ipv4.tcp_rmem": f"4096 {window} {window}", "net.ipv4.tcp_wmem": f"4096 {window} {window}"}
            _run(["ip", "netns", "exec", name, "sysctl", "-q", "-w", *[f"{key}={value}" for key, value in settings.items()]])
        for cable in self.cables:
            if not self.delay_of(cable):
                near, far = cable.near, cable.far
                _run(["ip", "-n", near.namespace, "link", "add", near.device, "type", "veth", "peer", "name", far.device,
                      "netns", far.namespace])

    def wire(self) -> None:
        """Addresses, routes and shapes."""
        for cable in self.cables:
            for port in (cable.near, cable.far):
                _run(["ip", "-n", port.namespace, "link", "set", port.device, "mtu", str(MTU)])
                _run(["ip", "-n", port.namespace, "addr", "add", f"{port.address}/24", "dev", port.device])
                _run(["ip", "-n", port.namespace, "link", "set", port.device, "up"])
        for namespace, route in _routes(self.spec, self.network, self.leaves):
            _run(["ip", "-n", namespace, "route", "add", *route])
        self.shape(self.spec)

    def shape(self, spec: LabSpec) -> None:
        """Give every link the rate that `spec` says; geometry and delays must be those of the lab."""
        same = replace(spec, nic_bit_per_s=self.spec.nic_bit_per_s, nvlink_bit_per_s=self.spec.nvlink_bit_per_s,
                       oversubscription=self.spec.oversubscription, name=self.spec.name)
        if same != self.spec:
            raise LabError("only rates can change while a lab stands")
        self.spec, self.network = spec, Network(spec.cluster())
        for cable in self.cables:
            rate = self._rate_of(cable)
            for port, pairs in ((cable.near, self._pairs(cable)), (cable.far, [(b, a) for a, b in self._pairs(cable)])):
                _batch(port.namespace, shaping(port.device, rate, pairs))

    def delay_of(self, cable: Cable) -> float:
        """One-way seconds of a cable."""
        return {"nic": self.spec.nic_delay_s / 2, "uplink": self.spec.hop_delay_s, "nvlink": 0.0}[cable.kind]

    def _pairs(self, cable: Cable) -> list[tuple[int, int]]:
        """(source, destination) ranks whose bytes leave the near end of a cable."""
        ranks, leaf_of, per_host = range(self.spec.ranks), self.network.leaf_of, self.spec.ranks_per_host
        pairs = [(a, b) for a in ranks for b in ranks if a != b]
        if cable.kind == "uplink":
            return [(a, b) for a, b in pairs if leaf_of[a] == cable.leaf != leaf_of[b]]
        inside = cable.kind == "nvlink"
        return [(a, b) for a, b in pairs
                if cable.near.namespace == rank_namespace(a) and (a // per_host == b // per_host) == inside]

    def _rate_of(self, cable: Cable) -> float:
        spec = self.spec
        if cable.kind == "uplink":
            nics = {int(n) for n, leaf in zip(self.network.nic_of, self.network.leaf_of, strict=True) if leaf == cable.leaf}
            return len(nics) * spec.nic_bit_per_s / spec.oversubscription
        return spec.nic_bit_per_s if cable.kind == "nic" else spec.nvlink_bit_per_s


@contextmanager
def lab(spec: LabSpec) -> Iterator[Lab]:
    """A standing lab; leftovers of earlier ones go first, and it goes at the end whatever happens."""
    with alone():
        yield from _standing(spec)


def _standing(spec: LabSpec) -> Iterator[Lab]:
    remove_all()
    made = Lab(spec)
    line: subprocess.Popen[bytes] | None = None
    try:
        made.build()
        if spec.delayed:
            line = _start_delay_line(made)
        made.wire()
        yield made
    finally:
        if line is not None:
            line.terminate()
            line.communicate(timeout=10)
        remove_all()


def rank_namespace(rank: int) -> str:
    return f"{PREFIX}rank{rank}"


def rank_address(rank: int) -> str:
    return f"10.77.{rank}.2"


def go_first() -> None:
    """Ask the kernel to run this process before others: what is timed is the network, not who else is busy here."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)


def in_namespace(namespace: str, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` there."""
    return ["ip", "netns", "exec", namespace, *command]


def _cables(spec: LabSpec, network: Network) -> Iterator[Cable]:
    for rank in range(spec.ranks):
        leaf = int(network.leaf_of[rank])
        yield Cable("nic", leaf, Port(rank_namespace(rank), "nic0", rank_address(rank)),
                    Port(f"{PREFIX}leaf{leaf}", f"rank{rank}", f"10.77.{rank}.1"))
        if spec.ranks_per_host > 1:
            yield Cable("nvlink", leaf, Port(rank_namespace(rank), "nv0", f"10.79.{rank}.2"),
                        Port(f"{PREFIX}nv{rank // spec.ranks_per_host}", f"rank{rank}", f"10.79.{rank}.1"))
    for leaf in sorted({int(leaf) for leaf in network.leaf_of}):
        yield Cable("uplink", leaf, Port(f"{PREFIX}leaf{leaf}", "up0", f"10.78.{leaf}.2"),
                    Port(f"{PREFIX}spine", f"leaf{leaf}", f"10.78.{leaf}.1"))


def _routes(spec: LabSpec, network: Network, leaves: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    """(namespace, route) of all that is not directly attached. Windows open at full size: nothing is lost here, and
    slow start is not what the lab is about."""
    windows = ["initcwnd", "200", "initrwnd", "200"]
    for rank in range(spec.ranks):
        name, host = rank_namespace(rank), rank // spec.ranks_per_host
        yield name, ["default", "via", f"10.77.{rank}.1", "src", rank_address(rank), *windows]
        for peer in range(host * spec.ranks_per_host, (host + 1) * spec.ranks_per_host):
            if peer != rank:
                yield name, [f"{rank_address(peer)}/32", "via", f"10.79.{rank}.1", "src", rank_address(rank), *windows]
                yield f"{PREFIX}nv{host}", [f"{rank_address(peer)}/32", "via", f"10.79.{peer}.2", "metric", str(rank)]
        yield f"{PREFIX}spine", [f"10.77.{rank}.0/24", "via", f"10.78.{int(network.leaf_of[rank])}.2"]
    for leaf in leaves:
        yield f"{PREFIX}leaf{leaf}", ["default", "via", f"10.78.{leaf}.1"]


def _start_delay_line(made: Lab) -> subprocess.Popen[bytes]:
    ends = [f"{c.near.namespace}:{c.near.device}:{c.far.namespace}:{c.far.device}:{made.delay_of(c):.6f}"
            for c in made.cables if made.delay_of(c)]
    line = subprocess.Popen([sys.executable, "-m", "benchmarks.netlab.delay", *ends], stdout=subprocess.PIPE, cwd=_ROOT)
    assert line.stdout is not None
    deadline = time.monotonic() + 20
    if line.stdout.readline().strip() != b"ready" or time.monotonic() > deadline:
        line.kill()
        raise LabError("the delay line did not start; it needs /dev/net/tun")
    return line


def shaping(device: str, bit_per_s: float, pairs: Sequence[tuple[int, int]]) -> list[str]:
    """tc lines that give a device a rate which all pairs of ranks share evenly, packet by packet, whoever is there.

    Bare acknowledgements go first, as they do in fabrics that keep them in a class of their own.
    """
    rate, queue = f"{round(bit_per_s)}bit", 2 * len(pairs) + 1
    small = f"rate {max(8000, round(bit_per_s / 1000 / queue))}bit ceil {rate} quantum {MTU + 14} cburst {MTU + 14}"
    lines = [f"qdisc replace dev {device} root handle 2: pfifo",  # what stood there goes, with its classes
             f"qdisc replace dev {device} root handle 1: htb default 2",
             f"class add dev {device} parent 1: classid 1:1 htb rate {rate} burst {BURST_BYTES} cburst {BURST_BYTES}",
             f"class add dev {device} parent 1:1 classid 1:2 htb {small} prio 0",
             f"filter add dev {device} parent 1: protocol ip prio 1 u32 match u16 52 0xffff at 2 flowid 1:2"]
    for number, (source, target, mark) in enumerate(((a, b, m) for a, b in pairs for m in (0, MARK)), start=0x10):
        lines += [f"class add dev {device} parent 1:1 classid 1:{number:x} htb {small} prio 1",
                  f"qdisc add dev {device} parent 1:{number:x} bfifo limit {_QUEUE_BYTES}",
                  f"filter add dev {device} parent 1: protocol ip prio 2 u32 match ip src {rank_address(source)} "
                  f"match ip dst {rank_address(target)} match ip tos {mark:#x} 0xfc flowid 1:{number:x}"]
    return lines


def _batch(namespace: str, lines: Sequence[str]) -> None:
    done = subprocess.run(["tc", "-n", namespace, "-batch", "-"], check=False, input="\n".join(lines), text=True,
                          capture_output=True, timeout=20)
    if done.returncode:
        raise LabError(f"tc in {namespace}: {done.stderr.strip()}")


def _run(command: list[str], *, check: bool = True) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    if check and done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
