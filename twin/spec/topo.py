"""Read `nvidia-smi topo -m`: how one node's GPUs and NICs hang together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from twin.spec.errors import Problem, SpecError
from twin.spec.parse import read_text

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LINK = re.compile(r"^(X|NV\d+|PIX|PXB|PHB|NODE|SYS|SOC|N/A)$")
NEAR = ("PIX", "PXB")
"""A NIC behind the same PCIe switch as a GPU."""


@dataclass(frozen=True)
class NodeTopology:
    """`nvlinks[i][j]`: NVLink links bonded between GPUs i and j (0: none). `near_nics[i]`: NICs on GPU i's PCIe switch."""

    gpus: int
    nics: tuple[str, ...]
    nvlinks: tuple[tuple[int, ...], ...]
    near_nics: tuple[tuple[str, ...], ...]

    @property
    def all_to_all_nvlink(self) -> bool:
        """Whether every pair of GPUs is joined by NVLink (an NVSwitch, or a full mesh)."""
        return all(n > 0 for i, row in enumerate(self.nvlinks) for j, n in enumerate(row) if i != j)


def read_topo(path: Path) -> NodeTopology:
    """Parse a saved `nvidia-smi topo -m`. Raises SpecError with the line that cannot be read."""
    lines = [_ANSI.sub("", line) for line in read_text(path).splitlines()]
    start = next((i for i, line in enumerate(lines) if re.match(r"^\s+GPU0\b", line)), None)
    if start is None:
        raise SpecError("no matrix with a GPU0 column", file=path, expected="the output of `nvidia-smi topo -m`")
    columns = lines[start].split()
    names = [c for c in columns if re.fullmatch(r"GPU\d+|NIC\d+|mlx\d+_\d+|\w*ib\w*\d*", c)]
    gpus = [c for c in names if c.startswith("GPU")]
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines[start + 1 :], start + 2):
        cells = line.split()
        if not cells or cells[0] not in names:
            if rows:
                break
            continue
        links = cells[1 : len(names) + 1]
        bad = [c for c in links if not _LINK.match(c)]
        if bad or len(links) < len(names):
            raise SpecError(
                Problem(
                    f"row {cells[0]} cannot be read" + (f": {bad[0][:20]!r}" if bad else ": too few columns"),
                    line=number,
                    expected="X, NV#, PIX, PXB, PHB, NODE or SYS",
                ),
                file=path,
            )
        rows[cells[0]] = links
    missing = [g for g in gpus if g not in rows]
    if missing:
        raise SpecError(f"no row for {missing[0]}", file=path)
    nics = tuple(n for n in names if not n.startswith("GPU"))
    column = {name: i for i, name in enumerate(names)}
    nvlinks = tuple(tuple(int(link[2:]) if (link := rows[a][column[b]]).startswith("NV") else 0 for b in gpus) for a in gpus)
    near = tuple(tuple(n for n in nics if rows[g][column[n]] in NEAR) for g in gpus)
    return NodeTopology(len(gpus), nics, nvlinks, near)
