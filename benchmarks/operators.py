"""Times the engine's operators at any shape against the read bandwidth and matrix peak of the same run.

    python benchmarks/operators.py --op moe --tokens 64 --experts 128 --hidden 2048 --width 768 --topk 8
    python benchmarks/operators.py --op gqa --batch 64 --context 4096 --heads 32 --kv-heads 4 --head-dim 128 --json out.json
    python benchmarks/operators.py --op all            # every operator at the shape given
    python benchmarks/operators.py --suite             # every operator at the shapes that the engine's targets name

Each figure is a CUDA-graph replay over rotated random inputs larger together than the L2 cache (`timing.time_graph`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import Call, as_row, measure_ceilings, provenance, rotations, time_graph
from runtime.kernels import align, attention_gqa, attention_mla, fused, gate, moe_layer, rope, sampling


@dataclass(frozen=True)
class Shape:
    """The shape a case is built at; each operator reads the fields it needs."""

    tokens: int
    experts: int
    hidden: int
    width: int
    topk: int
    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    vocab: int
    dtype: str
    route: str


@dataclass(frozen=True)
class Point:
    """One line of a table: an operator at a shape."""

    label: str
    op: str
    shape: Shape


@dataclass(frozen=True)
class Case:
    """Calls on rotated inputs, the bytes one call must move and the operations it must do."""

    calls: list[Call]
    bytes_: int
    flops: int


@click.command(help=__doc__)
@click.option("--op", "ops", multiple=True, default=("all",), help="operator, may be repeated; 'all' for every one")
@click.option("--tokens", default=64, show_default=True)
@click.option("--experts", default=128, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--width", default=768, show_default=True, help="expert width")
@click.option("--topk", default=8, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--context", default=4096, show_default=True)
@click.option("--heads", default=32, show_default=True)
@click.option("--kv-heads", default=4, show_default=True)
@click.option("--head-dim", default=128, show_default=True)
@click.option("--block-tokens", default=64, show_default=True)
@click.option("--vocab", default=151936, show_default=True)
@click.option("--dtype", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True, help="of weights or cache")
@click.option("--route", type=click.Choice(["uniform", "one"]), default="uniform", show_default=True)
@click.option("--suite", is_flag=True, help="the targets' shapes instead of the one given")
@click.option("--commit", default=None, help="git commit to record (else $GIT_COMMIT)")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="also write all figures here")
def main(
    ops: tuple[str, ...], suite: bool, commit: str | None, json_path: Path | None, **shape: int | str
) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("needs a CUDA GPU")
    names = list(CASES) if "all" in ops else list(ops)
    unknown = [n for n in names if n not in CASES]
    if unknown:
        raise click.UsageError(f"no operator {unknown[0]!r}; there are: {', '.join(CASES)}")
    base = Shape(**shape)
    points = suite_points(base) if suite else [Point(name, name, base) for name in names]
    print(run(points, commit, json_path))


def run(points: list[Point], commit: str | None, json_path: Path | None) -> str:
    """Measure, write the JSON if asked, return the table."""
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    rows = [
        {"label": p.label, "operator": p.op, "shape": asdict(p.shape), **measure(p.op, p.shape, ceilings)} for p in points
    ]
    if json_path:
        write_json(json_path, {"provenance": provenance(commit), "ceilings": asdict(ceilings), "operators": rows})
    head = (
        f"read {ceilings.read_bytes_per_s / 1e12:.2f} TB/s, bf16 product {ceilings.bf16_flop_per_s / 1e12:.0f} TFLOP/s\n"
        f"{'operator':34} {'median':>10} {'p10..p90':>17} {'TB/s':>6} {'of read':>8} {'TFLOP/s':>8} {'of bf16':>8}"
    )
    return "\n".join([head, *(_line(row) for row in rows)])


def suite_points(base: Shape) -> list[Point]:
    """The shapes of the engine's targets: one Qwen3-30B-A3B layer from decode to prefill, and latent attention."""
    points = []

    def add(op: str, **changes: int | str) -> None:
        label = " ".join([op, *(f"{k}={v}" for k, v in changes.items())])
        points.append(Point(label, op, replace(base, **changes)))

    for dtype in ("bf16", "fp8"):
        for tokens in (1, 8, 64, 256, 1024, 4096, 16384):
            add("moe", tokens=tokens, dtype=dtype)
    add("moe", tokens=64, experts=32, hidden=7168, width=2048, topk=1)
    for batch, context in ((1, 1024), (64, 1024), (256, 1024), (64, 4096), (8, 16384)):
        add("gqa", batch=batch, context=context)
    add("gqa", batch=64, context=4096, block_tokens=16)
    add("gqa", batch=64, context=4096, dtype="fp8")
    for heads, batch in ((16, 16), (16, 64), (32, 64), (64, 64), (64, 128), (128, 16), (128, 64), (128, 128)):
        add("mla", heads=heads, batch=batch)
    for tokens in (64, 16384):
        for op in ("align", "gate", "norm", "silu", "quant", "rope"):
            add(op, tokens=tokens)
    add("sample", batch=64)
    return points


def measure(name: str, shape: Shape, ceilings) -> dict:
    """One operator's figures at one shape."""
    case = CASES[name](shape)
    row = as_row(time_graph(case.calls), case.bytes_, case.flops, ceilings)
    torch.cuda.empty_cache()
    return row


def _line(r: dict) -> str:
    spread = f"{r['p10_s'] * 1e6:.1f}..{r['p90_s'] * 1e6:.1f}"
    return (
        f"{r['label']:34} {r['median_s'] * 1e6:8.1f}us {spread:>17} {r['bytes_per_s'] / 1e12:6.2f} {r['read_share']:8.1%}"
        f" {r['flop_per_s'] / 1e12:8.1f} {r['bf16_share']:8.1%}"
    )


def write_json(path: Path, document: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def routing(s: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Random distinct experts a token ("uniform"), or the same ones for all ("one")."""
    scores = torch.rand(1 if s.route == "one" else s.tokens, s.experts, device="cuda").expand(s.tokens, -1)
    weights, ids = torch.softmax(scores, -1).topk(s.topk, -1)
    return weights.contiguous(), ids.int().contiguous()


def moe_case(s: Shape) -> Case:
    """One MoE layer, align included. Token sets with routes of their own rotate, so that few tokens' weights miss L2."""
    w13 = _randn(s.experts, 2 * s.width, s.hidden)
    w2 = _randn(s.experts, s.hidden, s.width)
    scales = {}
    if s.dtype == "fp8":
        (w13, scales["w13_scale_E2I"]), (w2, scales["w2_scale_EH"]) = (_fp8(w) for w in (w13, w2))
    most_bytes = min(s.experts, s.tokens * s.topk) * 3 * s.hidden * s.width * w13.element_size()
    sets = [(_randn(s.tokens, s.hidden), *routing(s)) for _ in range(rotations(most_bytes))]
    touched = sum(ids.unique().numel() for _, _, ids in sets) / len(sets)
    bytes_ = round(touched * 3 * s.hidden * s.width * w13.element_size()) + 4 * s.tokens * s.hidden
    calls = [lambda a=a: moe_layer.moe_layer(a[0], w13, w2, a[1], a[2], **scales) for a in sets]
    return Case(calls, bytes_, 6 * s.tokens * s.topk * s.hidden * s.width)


def align_case(s: Shape) -> Case:
    _, ids = routing(s)
    return Case([lambda: align.align(ids, s.experts, 16)], 8 * ids.numel(), 0)


def gqa_case(s: Shape) -> Case:
    blocks = s.batch * -(-s.context // s.block_tokens)
    shape = (blocks, 2, s.block_tokens, s.kv_heads, s.head_dim)
    size = 2 * blocks * s.block_tokens * s.kv_heads * s.head_dim * (1 if s.dtype == "fp8" else 2)
    caches = [_randn(*shape) for _ in range(rotations(size))]
    if s.dtype == "fp8":
        caches = [c.to(torch.float8_e4m3fn) for c in caches]
    q = torch.randn(s.batch, s.heads, s.head_dim, dtype=torch.bfloat16, device="cuda")
    table, lengths = _pages(s, blocks)
    calls = [
        lambda c=c: attention_gqa.gqa_decode(q, c, table, lengths, scale=s.head_dim**-0.5, max_context=s.context)
        for c in caches
    ]
    return Case(calls, size + 4 * q.numel(), 4 * s.batch * s.context * s.heads * s.head_dim)


def mla_case(s: Shape) -> Case:
    blocks = s.batch * -(-s.context // s.block_tokens)
    size = blocks * s.block_tokens * 576 * 2
    caches = [_randn(blocks, s.block_tokens, 576) for _ in range(rotations(size))]
    q = torch.randn(s.batch, s.heads, 576, dtype=torch.bfloat16, device="cuda")
    table, lengths = _pages(s, blocks)
    calls = [
        lambda c=c: attention_mla.mla_decode(q, c, table, lengths, scale=192**-0.5, max_context=s.context) for c in caches
    ]
    bytes_ = size + 2 * q.numel() + 2 * s.batch * s.heads * 512
    return Case(calls, bytes_, 2 * s.batch * s.context * s.heads * (576 + 512))


def gate_case(s: Shape) -> Case:
    logits = torch.randn(s.tokens, s.experts, device="cuda")
    return Case([lambda: gate.gate_topk(logits, s.topk)], 4 * logits.numel() + 8 * s.tokens * s.topk, 0)


def norm_case(s: Shape) -> Case:
    sets = rotations(8 * s.tokens * s.hidden)
    pairs = [(_randn(s.tokens, s.hidden), _randn(s.tokens, s.hidden)) for _ in range(sets)]
    weight = _randn(s.hidden)
    calls = [lambda p=p: fused.add_rmsnorm(p[0], weight, 1e-6, p[1]) for p in pairs]
    return Case(calls, 8 * s.tokens * s.hidden, 0)


def silu_case(s: Shape) -> Case:
    rows = s.tokens * s.topk
    sets = [_randn(rows, 2 * s.width) for _ in range(rotations(6 * rows * s.width))]
    return Case([lambda x=x: fused.silu_mul(x) for x in sets], 6 * rows * s.width, 0)


def quant_case(s: Shape) -> Case:
    sets = [_randn(s.tokens, s.hidden) for _ in range(rotations(3 * s.tokens * s.hidden))]
    return Case([lambda x=x: fused.quant_fp8_rows(x) for x in sets], 3 * s.tokens * s.hidden, 0)


def rope_case(s: Shape) -> Case:
    columns = (s.heads + 2 * s.kv_heads) * s.head_dim
    sets = [_randn(s.tokens, columns) for _ in range(rotations(4 * s.tokens * columns))]
    blocks = -(-s.tokens // s.block_tokens)
    cache = _randn(blocks, 2, s.block_tokens, s.kv_heads, s.head_dim)
    angles = torch.randn(s.context, s.head_dim, device="cuda")
    norm, slots = _randn(s.head_dim), torch.randperm(s.tokens, device="cuda")
    positions = torch.randint(0, s.context, (s.tokens,), device="cuda")
    calls = [
        lambda x=x: rope.rope_norm_cache(
            x, positions, slots, angles, cache, heads=s.heads, q_norm_D=norm, k_norm_D=norm
        )
        for x in sets
    ]  # fmt: skip
    return Case(calls, 4 * s.tokens * columns + 4 * s.tokens * s.kv_heads * s.head_dim, 0)


def sample_case(s: Shape) -> Case:
    sets = [torch.randn(s.batch, s.vocab, device="cuda") for _ in range(rotations(4 * s.batch * s.vocab))]
    full = lambda value, dtype: torch.full((s.batch,), value, dtype=dtype, device="cuda")  # noqa: E731
    i64, f32 = torch.int64, torch.float32
    settings = sampling.SamplingTensors(
        full(0.8, f32), full(50, i64), full(0.95, f32), full(0.0, f32), full(1, i64), full(0, i64)
    )
    return Case([lambda x=x: sampling.sample(x, settings) for x in sets], 4 * s.batch * s.vocab, 0)


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    fp8, scale = fused.quant_fp8_rows(w.flatten(0, 1))
    return fp8.unflatten(0, w.shape[:2]), scale.unflatten(0, w.shape[:2])


def _pages(s: Shape, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A scattered block table and full lengths."""
    table = torch.randperm(blocks, device="cuda").int().view(s.batch, -1).contiguous()
    return table, torch.full((s.batch,), s.context, dtype=torch.int32, device="cuda")


CASES: dict[str, Callable[[Shape], Case]] = {
    "moe": moe_case,
    "align": align_case,
    "gqa": gqa_case,
    "mla": mla_case,
    "gate": gate_case,
    "norm": norm_case,
    "silu": silu_case,
    "quant": quant_case,
    "rope": rope_case,
    "sample": sample_case,
}

if __name__ == "__main__":
    main()
