"""The cluster drawn: nodes, GPUs coloured by pool, NVLink domains, rails with their leaf switches, and the spine."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup, escape

from reports.blocks import Drawing, Section
from reports.figures import ROLE
from reports.load import Story
from reports.words import clip, number, plural
from twin.spec.cluster import ClusterSpec, NodeGroup
from twin.spec.plan import Plan
from twin.spec.units import format_si

MAX_NODES = 24
GPU, GAP, PAD = 24, 4, 12
RAIL_STEP, HEAD, SWITCH = 6, 22, 16


@dataclass(frozen=True)
class Seat:
    """Where one GPU of the plan sits."""

    role: str
    pool: int
    instance: int
    rank: int
    dp_rank: int
    tp_rank: int
    ep_rank: int


@dataclass(frozen=True)
class Node:
    """One machine of the drawing. `first_gpu` counts over the cluster; `domain` is its NVLink domain."""

    index: int
    group: NodeGroup
    first_gpu: int
    domain: int


def section(story: Story) -> Section:
    title = "Topology"
    if story.scenario is None:
        return Section("topology", title, absent="no scenario.yaml here, which describes the cluster")
    cluster = story.scenario.cluster
    nodes = _nodes(cluster)
    seats = _seats(cluster, nodes, story.plan)
    shown = nodes[:MAX_NODES]
    lead = "GPUs are filled in the order of the plan, instance by instance; the number is the instance."
    if len(nodes) > len(shown):
        lead += f" The first {len(shown)} of {len(nodes)} nodes are drawn."
    return Section("topology", title, (Drawing("topology", _draw(cluster, shown, seats), _summary(cluster, story.plan)),), lead)


def _nodes(cluster: ClusterSpec) -> list[Node]:
    nodes: list[Node] = []
    gpu = 0
    for group in cluster.groups:
        for _ in range(group.nodes):
            nodes.append(Node(len(nodes), group, gpu, gpu // cluster.network.nvlink_domain_gpus))
            gpu += group.gpus_per_node
    return nodes


def _seats(cluster: ClusterSpec, nodes: list[Node], plan: Plan | None) -> dict[int, Seat]:
    """GPU number -> seat: pools in order, each in its node group (or anywhere), instances one after another."""
    free: dict[str | None, list[int]] = {None: list(range(cluster.gpus))}
    for group in cluster.groups:
        free[group.name] = [g for n in nodes if n.group is group for g in range(n.first_gpu, n.first_gpu + group.gpus_per_node)]
    taken: dict[int, Seat] = {}
    for pool_index, pool in enumerate(plan.pools if plan is not None else ()):
        open_gpus = [g for g in free.get(pool.node_group, free[None]) if g not in taken]
        for position, gpu in enumerate(open_gpus[: pool.gpus]):
            rank = position % pool.world
            taken[gpu] = Seat(
                pool.role, pool_index, position // pool.world, rank, rank // pool.tp, rank % pool.tp, rank * pool.ep // pool.world
            )
    return taken


def _summary(cluster: ClusterSpec, plan: Plan | None) -> str:
    net = cluster.network
    words = [
        f"{plural(cluster.nodes, 'node')} with {plural(cluster.gpus, 'GPU')}",
        f"NVLink domains of {net.nvlink_domain_gpus} GPUs at {format_si(net.nvlink_bytes_per_s, 'B/s')} a GPU",
    ]
    if net.nics_per_node and net.nic_bytes_per_s:
        words.append(f"{net.nics_per_node} NICs a node at {format_si(net.nic_bytes_per_s, 'B/s')}")
        words.append(
            ("one leaf switch a rail" if net.rails else "one leaf switch a node")
            + f", oversubscription {number(net.oversubscription)}:1"
        )
    if plan is not None:
        words.append(f"the plan uses {plan.gpus} of {cluster.gpus} GPUs")
    return "; ".join(words) + "."


def _draw(cluster: ClusterSpec, nodes: list[Node], seats: dict[int, Seat]) -> Markup:
    """The whole drawing. Rows of nodes; above each row one line a rail, ending at its leaf; the spine joins the leaves."""
    per_node = max(n.group.gpus_per_node for n in nodes)
    rails = min(cluster.network.nics_per_node, 16) if cluster.network.rails else min(1, cluster.network.nics_per_node)
    node_w = min(per_node, 16) * (GPU + GAP) - GAP + 2 * PAD
    lines = -(-per_node // 16)
    per_row = max(1, min(len(nodes), 1080 // (node_w + 16)))
    rows = [nodes[i : i + per_row] for i in range(0, len(nodes), per_row)]
    bus_h = rails * RAIL_STEP + 14 if rails else 0
    node_h = HEAD + lines * (GPU + GAP) + SWITCH + 2 * PAD - 4
    row_h = bus_h + node_h + 18
    leaf_x = per_row * (node_w + 16) + 8
    width, height = leaf_x + (96 if rails else 0), len(rows) * row_h
    parts: list[Markup] = []
    for row_index, row in enumerate(rows):
        top = row_index * row_h
        parts += _bus(cluster, row, top, rails, node_w, leaf_x)
        for column, node in enumerate(row):
            parts.append(_node(cluster, node, seats, column * (node_w + 16), top + bus_h, node_w, node_h))
    if rails:
        parts += _leaves(cluster, len(rows), per_row, rails, row_h, leaf_x)
        parts.append(_spine(cluster, leaf_x + 62, height))
    drawing = Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" class="topology" style="max-width:{w}px;min-width:{least}px">{body}</svg>'
    ).format(w=width, h=height, least=min(width, 560), body=Markup("").join(parts))
    return drawing + _legend(seats)


def _bus(cluster: ClusterSpec, row: list[Node], top: int, rails: int, node_w: int, leaf_x: int) -> list[Markup]:
    """Rails above one row: a line each to its leaf switch, a drop to every GPU (or node) on it."""
    parts: list[Markup] = []
    bus_h = rails * RAIL_STEP + 14
    for rail in range(rails):
        y = top + 8 + rail * RAIL_STEP
        parts.append(Markup('<path class="wire" d="M{x0} {y} H{x1}"/>').format(x0=PAD, y=y, x1=leaf_x))
        parts.append(Markup('<path class="wire" d="M{x} {y} H{z}"/>').format(x=leaf_x + 34, y=y, z=leaf_x + 62))
        for column, node in enumerate(row):
            left = column * (node_w + 16)
            gpus = [g for g in range(node.group.gpus_per_node) if g % rails == rail] if cluster.network.rails else [0]
            for gpu in gpus[:16]:
                x = left + PAD + (gpu % 16) * (GPU + GAP) + GPU / 2 if cluster.network.rails else left + node_w / 2
                parts.append(
                    Markup('<path class="wire drop" d="M{x} {y} V{z}"/><circle class="joint" cx="{x}" cy="{y}" r="1.6"/>').format(
                        x=x, y=y, z=top + bus_h
                    )
                )
    return parts


def _leaves(cluster: ClusterSpec, rows: int, per_row: int, rails: int, row_h: int, leaf_x: int) -> list[Markup]:
    """Leaf switches: a box for all rows whose nodes fit on the same ports, with how many switches it stands for."""
    together = max(1, min(rows, cluster.network.leaf_ports // per_row)) if cluster.network.rails else 1
    parts = []
    for first in range(0, rows, together):
        covered = min(together, rows - first)
        top, height = first * row_h + 2, (covered - 1) * row_h + max(14, rails * RAIL_STEP + 8)
        words = f"{rails} leaf switches" if cluster.network.rails else "leaf switches"
        turned = height > 70
        parts.append(
            Markup(
                '<rect class="switch" x="{x}" y="{y}" width="34" height="{h}" rx="4"/><text class="tiny" '
                'transform="translate({c} {m}) rotate({a})">{words}</text>'
            ).format(
                x=leaf_x,
                y=top,
                h=height,
                c=leaf_x + 17,
                m=top + height / 2,
                a=90 if turned else 0,
                words=words if turned else f"{rails} leaf" if cluster.network.rails else "leaf",
            )
        )
    return parts


def _spine(cluster: ClusterSpec, x: int, height: int) -> Markup:
    return Markup(
        '<rect class="switch" x="{x}" y="2" width="26" height="{h}" rx="4"/>'
        '<text class="tiny" transform="translate({c} {m}) rotate(90)">spine {ratio}:1</text>'
    ).format(x=x, h=height - 18, c=x + 10, m=(height - 18) / 2 + 2, ratio=number(cluster.network.oversubscription))


def _node(cluster: ClusterSpec, node: Node, seats: dict[int, Seat], x: int, y: int, w: int, h: int) -> Markup:
    """One machine: its name, its GPUs and the NVSwitch that joins them."""
    squares = []
    for gpu in range(node.group.gpus_per_node):
        at_x, at_y = x + PAD + (gpu % 16) * (GPU + GAP), y + HEAD + 4 + (gpu // 16) * (GPU + GAP)
        squares.append(_gpu(node, gpu, seats.get(node.first_gpu + gpu), at_x, at_y))
    bar_y = y + h - SWITCH - PAD + 4
    lone = cluster.network.nvlink_domain_gpus <= node.group.gpus_per_node
    name = node.group.gpu.name
    rate = format_si(cluster.network.nvlink_bytes_per_s, "B/s")
    return Markup(
        '<rect class="node" x="{x}" y="{y}" width="{w}" height="{h}" rx="8"/>'
        '<text class="small" x="{tx}" y="{ty}">node {n} · {name}</text>{squares}'
        '<rect class="nvlink" x="{tx}" y="{by}" width="{bw}" height="{bh}" rx="4"/>'
        '<text class="tiny" x="{cx}" y="{by2}">NVLink{domain} · {rate}</text>'
    ).format(
        x=x + 0.5,
        y=y + 0.5,
        w=w,
        h=h,
        tx=x + PAD,
        ty=y + 17,
        n=node.index,
        name=clip(name, 28),
        squares=Markup("").join(squares),
        by=bar_y,
        bw=w - 2 * PAD,
        bh=SWITCH,
        cx=x + w / 2,
        by2=bar_y + 8.5,
        domain="" if lone else f" domain {node.domain}",
        rate=rate,
    )


def _gpu(node: Node, gpu: int, seat: Seat | None, x: float, y: float) -> Markup:
    words = f"node {node.index}, GPU {gpu}"
    if seat is None:
        return Markup(
            '<rect class="gpu idle" x="{x}" y="{y}" width="{s}" height="{s}" rx="4"><title>{t}: not used</title></rect>'
        ).format(x=x, y=y, s=GPU, t=words)
    words += f": {seat.role} instance {seat.instance}, rank {seat.rank} (DP {seat.dp_rank}, TP {seat.tp_rank}, EP {seat.ep_rank})"
    return Markup(
        '<g><rect class="gpu" x="{x}" y="{y}" width="{s}" height="{s}" rx="4" fill="{c}" fill-opacity="{o}">'
        '<title>{t}</title></rect><text class="seat" x="{cx}" y="{cy}">{n}</text></g>'
    ).format(
        x=x,
        y=y,
        s=GPU,
        c=ROLE[seat.role],
        o=1 if seat.instance % 2 == 0 else 0.72,
        t=words,
        cx=x + GPU / 2,
        cy=y + GPU / 2 + 0.5,
        n=seat.instance,
    )


def _legend(seats: dict[int, Seat]) -> Markup:
    counts: dict[str, int] = {}
    for seat in seats.values():
        counts[seat.role] = counts.get(seat.role, 0) + 1
    items = [
        Markup('<span><i class="swatch {r}"></i>{r}: {n}</span>').format(r=escape(role), n=plural(n, "GPU"))
        for role, n in counts.items()
    ]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items)) if items else Markup("")
