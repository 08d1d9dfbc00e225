"""Latent-attention decode by every way to cut it, beside the cut that the engine chooses and the one that it chose before.

    python -m benchmarks.mla_splits --json out.json                   # about half a minute
    python -m benchmarks.mla_splits --shape 160,64,2500 --replays 30

For each shape (sequences, heads, context): all sequences in 1 to 8 splits; those that full rounds leave in 2 to 12 with the
others whole; `old`, all in as many splits as fill the device once; and `new`, what `twin.policy.latent_cuts` chooses. `mixed` are
`old` and `new` again where contexts lie evenly between half of it and all. Four sequences of `new` are compared with float64.
Then the merge of splits alone, in the pieces that serve and in pieces of 128 columns. Figures are medians of CUDA-graph replays
over inputs that together exceed the L2 cache; a shape's row is written as soon as it is measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
import triton

from benchmarks.timing import provenance, rotations, time_graph
from runtime.kernels import reference, splits
from runtime.kernels.attention_mla import mla_decode
from twin.policy.latent_cuts import LATENT, Cut, Shape, choose_cut, filling, in_full_rounds, seconds

Json = dict[str, Any]
Sizes = tuple[int, int, int]
SHAPES: tuple[Sizes, ...] = (
    (20, 64, 4096), (48, 64, 2500), (48, 128, 1500), (64, 128, 6000), (96, 128, 3000), (128, 64, 4096), (128, 128, 4096),
    (140, 128, 2000), (160, 64, 2500), (200, 128, 1500), (72, 16, 1100), (300, 16, 2000))
MERGES = ((1792, 4), (4096, 2), (2048, 4), (1024, 8), (512, 16))  # rows, splits
_ROPE, _BLOCK, _SCALE = 64, 64, 192**-0.5


def plain(cut: Cut, sequences: int) -> Cut:
    """One name for each cut."""
    return Cut(sequences, 1) if cut.splits == 1 or cut.whole >= sequences else cut


def cuts_of(sizes: Sizes, slots: int) -> dict[str, Cut]:
    """What is timed: name to cut; `old` and `new` may be equal to others."""
    sequences, heads, context = sizes
    shape = Shape(heads, slots)
    whole = int(in_full_rounds(shape, sequences))
    named = {f"all {n}": Cut(0, n) for n in (1, 2, 3, 4, 5, 6, 8)}
    if 0 < whole < sequences:
        named |= {f"rest {n}": Cut(whole, n) for n in (2, 3, 4, 6, 8, 12)}
    named["old"] = Cut(0, int(filling(shape, sequences, context)))
    named["new"] = choose_cut(sequences, heads, context, slots)
    return {name: plain(cut, sequences) for name, cut in named.items()}


def row_of(sizes: Sizes, slots: int, cuts: dict[str, Cut], took: dict[Cut, float], mixed: dict[str, float], error: float) -> Json:
    """One shape's figures, and what was predicted of old and new."""
    each = {name: took[cut] for name, cut in cuts.items()}
    best = min(each, key=lambda name: each[name])
    predicted = {name: float(seconds(Shape(sizes[1], slots), sizes[0], sizes[2], cuts[name].whole, cuts[name].splits))
                 for name in ("old", "new")}
    return {"sequences": sizes[0], "heads": sizes[1], "context": sizes[2],
            "cuts": {name: [cut.whole, cut.splits] for name, cut in cuts.items()},
            "each_s": each, "best": best, "best_s": each[best], "old_s": each["old"], "new_s": each["new"],
            "new_over_best": each["new"] / each[best], "predicted_s": predicted, "mixed_s": mixed, "error": error}


def table(rows: Sequence[Json]) -> str:
    """Rows in us."""
    us = lambda s: f"{s * 1e6:8.1f}"  # noqa: E731
    lines = ["sequences heads context  cut         best      new      old  new/best  predicted new, old     mixed new, old"]
    for r in rows:
        pair = lambda key, r=r: f"{us(r[key]['new'])} {us(r[key]['old'])}"  # noqa: E731
        cut, shape = "+".join(map(str, r["cuts"]["new"])), f"{r['sequences']:9} {r['heads']:5} {r['context']:7}"
        lines.append(f"{shape}  {cut:8}{us(r['best_s'])} {us(r['new_s'])} {us(r['old_s'])}  {r['new_over_best']:8.3f}  "
                     f"{pair('predicted_s')}  {pair('mixed_s')}  error {r['error']:.1e}, best: {r['best']}")
    return "\n".join(lines)


def measure(sizes: Sizes, slots: int, replays: int) -> Json:
    sequences, heads, context = sizes
    pages = -(-context // _BLOCK)
    shape = (sequences * pages, _BLOCK, LATENT + _ROPE)
    sets = rotations(2 * sequences * pages * _BLOCK * (LATENT + _ROPE))
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    inputs = [(draw(sequences, heads, LATENT + _ROPE), draw(*shape)) for _ in range(sets)]
    pages_BP = torch.randperm(shape[0], device="cuda").int().view(sequences, pages).contiguous()
    equal = torch.full((sequences,), context, dtype=torch.int32, device="cuda")
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(1)).cuda()
    mixed = torch.linspace(context / 2, context, sequences, device="cuda").int()[order].contiguous()
    run = lambda q, cache, lens, cut: mla_decode(q, cache, pages_BP, lens, scale=_SCALE, latent=LATENT, max_context=context,  # noqa: E731
                                                 cut=cut)
    time_s = lambda cut, lens: time_graph([lambda q=q, c=c: run(q, c, lens, cut) for q, c in inputs], replays).median_s  # noqa: E731
    cuts = cuts_of(sizes, slots)
    q, cache = inputs[0]
    few = torch.tensor(sorted({0, sequences // 2, sequences - 2, sequences - 1}), device="cuda")
    want = reference.mla_decode(q[few], cache, pages_BP[few], mixed[few], scale=_SCALE, latent=LATENT, compute=torch.float64)
    got = run(q, cache, mixed, cuts["new"])[few].double()
    error = float((got - want).norm() / want.norm())
    took = {cut: time_s(cut, equal) for cut in dict.fromkeys(cuts.values())}
    return row_of(sizes, slots, cuts, took, {name: time_s(cuts[name], mixed) for name in ("old", "new")}, error)


def measure_merge(rows: int, count: int, replays: int) -> Json:
    """A merge of rows of 512 columns: as it serves, and in pieces of 128 columns, as it was."""
    sets = rotations(rows * count * LATENT * 4)
    inputs = [(torch.randn(1, rows, count, LATENT, device="cuda"), torch.randn(1, rows, count, device="cuda"),
               torch.empty(1, rows, LATENT, device="cuda", dtype=torch.bfloat16)) for _ in range(sets)]
    pieces = lambda p, w, out: splits._merge_kernel[(rows, LATENT // 128)](  # noqa: E731
        p, w, out, count, LATENT, BLOCK_S=triton.next_power_of_2(count), BLOCK_D=128, num_warps=4)
    return {"rows": rows, "splits": count, "s": time_graph([lambda i=i: splits.merge(*i) for i in inputs], replays).median_s,
            "pieces_s": time_graph([lambda i=i: pieces(*i) for i in inputs], replays).median_s}


def _sizes(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> list[Sizes]:
    try:
        chosen = [tuple(int(n) for n in one.split(",")) for one in given]
    except ValueError:
        chosen = [()]
    if any(len(one) != 3 or min(one) < 1 for one in chosen):
        raise click.BadParameter("SEQUENCES,HEADS,CONTEXT, whole numbers from 1")
    return [(a, b, c) for a, b, c in chosen] or list(SHAPES)


@click.command(help=__doc__)
@click.option("--shape", "shapes", multiple=True, callback=_sizes, metavar="SEQUENCES,HEADS,CONTEXT", help="Repeatable.")
@click.option("--replays", type=click.IntRange(3), default=12)
@click.option("--commit", default=None)
@click.option("--json", "out", type=click.Path(path_type=Path), default=None)
def main(shapes: list[Sizes], replays: int, commit: str | None, out: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this benchmark needs a CUDA GPU")
    torch.manual_seed(0)
    slots = torch.cuda.get_device_properties(0).multi_processor_count
    found: Json = {"rows": [], "merges": [], "provenance": provenance(commit)}
    for sizes in shapes:
        found["rows"].append(measure(sizes, slots, replays))
        click.echo(table(found["rows"][-1:]).splitlines()[-1])
        _write(out, found)
    found["merges"] = [measure_merge(rows, count, replays) for rows, count in MERGES]
    _write(out, found)
    click.echo(table(found["rows"]))
    for m in found["merges"]:
        click.echo(f"merge of {m['rows']} rows, {m['splits']} splits: {m['s'] * 1e6:.1f} us, in pieces {m['pieces_s'] * 1e6:.1f}")


def _write(out: Path | None, found: Json) -> None:
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
