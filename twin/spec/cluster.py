"""ClusterSpec: GPUs, nodes and the network between them. Presets live in `topologies/`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twin.spec.base import Source, Spec
from twin.spec.units import Bytes, BytesPerS, FlopPerS, Seconds, UsdPerHour, Watts


class GpuSpec(Spec):
    """One accelerator (or a CPU standing in for one). Peak rates are dense and per GPU."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    kind: Literal["gpu", "cpu"] = "gpu"
    hbm_bytes: Annotated[Bytes, Field(gt=0)]
    hbm_bytes_per_s: BytesPerS
    bf16_flop_per_s: FlopPerS
    fp32_flop_per_s: FlopPerS | None = None
    fp8_flop_per_s: FlopPerS | None = None
    fp4_flop_per_s: FlopPerS | None = None
    sm_count: Annotated[int, Field(ge=1, le=10_000)] = 132
    power_w: Watts | None = None
    source: str = ""
    status: Source = "assumed"


class NetworkSpec(Spec):
    """Links of a cluster; every rate is one direction.

    `nvlink_*` is one GPU's port to its NVSwitch; `nvlink_domain_gpus` GPUs share a switch (8 in a node, 72 in an
    NVL72 rack). Each GPU uses NIC `local_index % nics_per_node` (a rail). Leaf switches join a rail (`rails` true) or a
    node (`rails` false); `oversubscription` is leaf downlink over uplink capacity to the spine.
    """

    nvlink_bytes_per_s: BytesPerS
    nvlink_latency_s: Seconds = 1e-6
    nvlink_domain_gpus: Annotated[int, Field(ge=1, le=4096)] = 8
    nics_per_node: Annotated[int, Field(ge=0, le=64)] = 8
    nic_bytes_per_s: BytesPerS | None = None
    nic_latency_s: Seconds = 5e-6
    pcie_bytes_per_s: BytesPerS = 55e9
    rails: bool = True
    leaf_ports: Annotated[int, Field(ge=1, le=4096)] = 32
    oversubscription: Annotated[float, Field(ge=1, le=64)] = 1.0
    switch_latency_s: Seconds = 0.3e-6


class NodeGroup(Spec):
    """`nodes` equal machines of `gpus_per_node` GPUs; `price_usd_per_gpu_h` is what one GPU costs an hour."""

    name: Annotated[str, Field(min_length=1, max_length=80)] = "default"
    nodes: Annotated[int, Field(ge=1, le=10_000)]
    gpus_per_node: Annotated[int, Field(ge=1, le=1024)]
    gpu: GpuSpec
    price_usd_per_gpu_h: UsdPerHour | None = None

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


class ClusterSpec(Spec):
    """One or more node groups on one network."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    groups: Annotated[tuple[NodeGroup, ...], Field(min_length=1, max_length=64)]
    network: NetworkSpec
    notes: tuple[str, ...] = ()
    status: Source = "assumed"

    @model_validator(mode="after")
    def _consistent(self) -> ClusterSpec:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError("node groups need different names")
        if self.nodes > 1 and self.network.nvlink_domain_gpus < self.gpus and not self.network.nics_per_node:
            raise ValueError("several nodes without a shared NVLink domain need nics_per_node >= 1")
        if self.network.nics_per_node and self.network.nic_bytes_per_s is None:
            raise ValueError("nics_per_node needs nic_bytes_per_s")
        return self

    @property
    def gpus(self) -> int:
        return sum(group.gpus for group in self.groups)

    @property
    def nodes(self) -> int:
        return sum(group.nodes for group in self.groups)

    def group(self, name: str | None = None) -> NodeGroup:
        """The group of that name, or the first. Raises KeyError when there is none of that name."""
        if name is None:
            return self.groups[0]
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)
