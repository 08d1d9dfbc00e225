"""Attention of prompts, by ours (`runtime.kernels.attention_prefill`), by torch's flash attention, and by cuDNN.

    python -m benchmarks.prompts --json out.json
    python -m benchmarks.prompts --case 32,8,128,0,1800x6 --case 128,128,128,64,3000
    python -m benchmarks.prompts --tiles                    # the portable kernel with several tiles

A case is query heads, key heads, columns of a head, columns that heads share (latent attention), and prompts: lengths joined by
`+`, `LxN` for N of one length, `L/C` for the last L of C tokens. CUDA-graph timing on random data; TFLOP/s count the causal half.
Ours is first held against float32 matrices, sequence by sequence. cuDNN serves prompts of one length alone; where heads share
columns the others get them copied into every head, which is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.timing import provenance, time_graph
from runtime.kernels.attention_prefill import PromptTile, prompt_attention
from runtime.pieces import PIECE_ROWS, pieces
from twin.spec.rundir import write_text

CASES = ("32,4,128,0,1800x6", "32,4,128,0,1800", "32,4,128,0,4096x4", "32,4,128,0,700x9", "32,4,128,0,256+700+1400+90+2500+1030",
         "32,4,128,0,1500/6000+1000/3000", "64,4,128,0,5000x2", "32,4,128,0,16384", "32,4,128,0,130x32", "64,8,64,0,2000x4",
         "128,128,128,64,3000", "128,128,128,64,900x4", "64,64,128,64,2500x2", "16,16,128,64,1100x8")
TILES = tuple(PromptTile(m, n, w, s) for m, n, w, s in ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)))
Json = dict[str, Any]


class Case:
    """Random inputs of one case, keys of heads as one tensor with their values, as projections leave them."""

    def __init__(self, text: str) -> None:
        heads, kv_heads, dim, shared, prompts = text.split(",")
        self.text, self.heads, self.kv_heads, self.dim, self.shared = text, int(heads), int(kv_heads), int(dim), int(shared)
        self.lens: list[int] = []
        self.contexts: list[int] = []
        for part in prompts.split("+"):
            found = re.fullmatch(r"(\d+)(?:/(\d+))?(?:x(\d+))?", part)
            if not found:
                raise click.BadParameter(f"{part!r} is none of L, LxN, L/C", param_hint="--case")
            length, context = int(found[1]), int(found[2] or found[1])
            self.lens += [length] * int(found[3] or 1)
            self.contexts += [context] * int(found[3] or 1)
        rows, keys = sum(self.lens), sum(self.contexts)
        new = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
        self.q = new(rows, self.heads, self.dim + self.shared)
        self.kv = new(keys, self.kv_heads, 2 * self.dim)
        self.k, self.v = self.kv.tensor_split(2, -1)
        self.rope = new(keys, self.shared) if self.shared else None
        self.starts, self.key_starts = (torch.tensor([0, *accumulate(n)], dtype=torch.int32, device="cuda")
                                        for n in (self.lens, self.contexts))
        self.scale = (self.dim + self.shared) ** -0.5

    @property
    def flops(self) -> float:
        """Of the pairs that are seen."""
        pairs = sum(n * (c - n) + n * (n + 1) / 2 for n, c in zip(self.lens, self.contexts, strict=True))
        return 2.0 * pairs * self.heads * (2 * self.dim + self.shared)

    def ours(self, tile: PromptTile | None = None) -> torch.Tensor:
        return prompt_attention(self.q, self.k, self.v, self.pieces(tile.rows if tile else PIECE_ROWS), scale=self.scale,
                                shared_CR=self.rope, tile=tile)

    @cache  # noqa: B019
    def pieces(self, rows: int) -> torch.Tensor:
        return torch.from_numpy(pieces(self.lens, self.contexts, rows)).cuda()

    def keys(self) -> torch.Tensor:
        """Whole keys of every head."""
        return self.k if self.rope is None else torch.cat([self.k, self.rope[:, None].expand(-1, self.kv_heads, -1)], -1)

    def flash(self) -> torch.Tensor:
        k, v = self.keys(), self.v
        if self.shared:  # it wants values as wide as keys
            v = F.pad(v, (0, self.shared))
        return torch.ops.aten._flash_attention_forward(self.q, k, v, self.starts, self.key_starts, max(self.lens),
                                                       max(self.contexts), 0.0, True, False, scale=self.scale)[0][..., :self.dim]

    def cudnn(self) -> torch.Tensor:
        count, length, context = len(self.lens), self.lens[0], self.contexts[0]
        q = self.q.unflatten(0, (count, length)).transpose(1, 2)
        k, v = (t.unflatten(0, (count, context)).transpose(1, 2) for t in (self.keys(), self.v))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            if length == context:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(length, context), scale=self.scale,
                                                  enable_gqa=True)

    def error(self, got: torch.Tensor) -> float:
        """Relative, in norm, of up to three sequences and four heads."""
        wrong = size = 0.0
        for i in range(min(3, len(self.lens))):
            n, c, row, first = self.lens[i], self.contexts[i], sum(self.lens[:i]), sum(self.contexts[:i])
            for head in {0, 1, self.heads // 2, self.heads - 1}:
                k = self.keys()[first:first + c, head * self.kv_heads // self.heads].float()
                v = self.v[first:first + c, head * self.kv_heads // self.heads].float()
                s = self.q[row:row + n, head].float() @ k.T * self.scale
                seen = torch.arange(c, device="cuda")[None] <= torch.arange(c - n, c, device="cuda")[:, None]
                want = torch.softmax(s.masked_fill(~seen, float("-inf")), -1) @ v
                wrong += float((got[row:row + n, head].float() - want).square().sum())
                size += float(want.square().sum())
        return (wrong / size) ** 0.5


def ways(case: Case, tiles: bool) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {"ours": case.ours, "flash": case.flash}
    if len(set(case.lens)) == 1 and len(set(case.contexts)) == 1:
        found["cudnn"] = case.cudnn
    for tile in TILES if tiles else ():
        found[f"{tile.rows}x{tile.keys}w{tile.warps}s{tile.stages}"] = lambda tile=tile: case.ours(tile)
    return found


def measured(text: str, tiles: bool) -> Json:
    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case(text)
    error = case.error(case.ours())
    row: Json = {"case": text, "flop": case.flops, "error": error, "seconds": {}}
    for name, call in ways(case, tiles).items():
        try:
            timing = time_graph([call], replays=15)
        except RuntimeError as err:
            click.echo(f"    {name}: {str(err)[:150]}")
            continue
        row["seconds"][name] = {"median_s": timing.median_s, "p10_s": timing.p10_s, "p90_s": timing.p90_s}
    rates = "  ".join(f"{name} {s['median_s'] * 1e6:7.1f} us {case.flops / s['median_s'] / 1e12:4.0f} TF"
                      for name, s in row["seconds"].items())
    click.echo(f"{text:45} error {error:.1e}  {rates}")
    return row


@click.command(help=__doc__)
@click.option("--case", "cases", multiple=True, default=CASES)
@click.option("--tiles", is_flag=True, help="Also the portable kernel with several tiles.")
@click.option("--commit", default=None)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), default=None)
def main(cases: tuple[str, ...], tiles: bool, commit: str | None, out: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this benchmark needs a CUDA GPU")
    rows: list[Json] = []
    for text in cases:
        rows.append(measured(text, tiles))
        if out is not None:
            write_text(out, json.dumps({"provenance": provenance(commit) | {"method": __doc__}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
