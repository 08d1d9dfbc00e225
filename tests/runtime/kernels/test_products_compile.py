"""The fp8 products' kernels compile for sm_90 with every tile they may have, without spilling, also where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import pathlib
import subprocess
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.fp8_moe import DOWNS, UPS
from runtime.kernels import align, moe_fp8, products
from runtime.tune_products import CANDIDATES

def build(kernel, constants, warps, stages, pdl=False, **types):
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    place = kernel.arg_names.index
    even = ("width", "depth", "hidden")
    aligned = {(place(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*" or name in even}
    source = ASTSource(kernel, signature, {(place(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages, **({"launch_pdl": True} if pdl else {})}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    binary = pathlib.Path(sys.argv[1]) / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)], capture_output=True, text=True).stdout
    assert "STACK:0" in usage, (kernel.__name__, constants, usage[-200:])
    return made

def tile(rows, columns):
    return f"tensordesc<fp8e4nv[{rows}, {columns}]>"

floats = dict.fromkeys(("parts", "x_scale", "w_scale", "h_scale", "scale"), "*fp32")
half = dict.fromkeys(("out", "bias", "residual", "rest", "gain", "y"), "*bf16")
whole = dict.fromkeys(("sorted_rows", "expert_ids", "num_padded", "ids", "map_", "counts", "ends", "places"), "*i32")
fp8 = dict.fromkeys(("x", "w", "w_rows", "w13", "h"), "*fp8e4nv")
types = {**floats, **half, **whole, **fp8}
moe = {**types, "steps": "*fp32"}
for share in {share for shares in CANDIDATES.values() for share in shares}:
    operands = {"x": tile(share.m, share.k), "w": tile(share.n, share.k)} if share.tma else {}
    flags = {"HAS_BIAS": share.whole, "ADD": False, "TMA": share.tma, "EVEN_N": False, "EVEN_K": True, "BLOCK_M": share.m,
             "BLOCK_N": share.n, "BLOCK_K": share.k, "PDL": True, "AHEAD": 512}
    flags["DIRECT"] = share.whole
    made = build(products._parts_kernel, flags, share.warps, share.stages, True, **{**types, **operands})
    assert all(part in made.asm["ptx"] for part in ("wgmma", "griddepcontrol.wait", "cp.async.bulk.prefetch.L2.global"))
    assert share.resident * made.metadata.shared <= 227 * 1024, (share, made.metadata.shared)
for n in sorted({share.n for shares in CANDIDATES.values() for share in shares}):
    common = {"MOST": 8, "BLOCK_M": 128, "BLOCK_N": n, "PDL": True}
    build(products._sum_kernel, {"HAS_BIAS": False, "ADD": False, "ROWS": 8, **common}, 4, 3, True, **types)
    row = {**types, "out": "*fp8e4nv", "eps": "fp32"}
    build(products._sum_gate_kernel, {"TILES": 2048 // n, **common}, 8, 3, True, **row)
    build(products._sum_norm_kernel, {"TILES": 2048 // n, "HAS_BIAS": False, **common}, 8, 3, True, **row)
for t in UPS:
    operands = {"w13": f"tensordesc<fp8e4nv[2, {t.n}, {t.k}]>"} if t.tma else {}
    made = build(moe_fp8._up_fp8_kernel, {
        "CHOICES": 8, "TILES_N": 768 // t.n, "GROUP": t.group, "TMA": t.tma, "EVEN_N": True, "EVEN_K": True, "BLOCK_M": t.m,
        "BLOCK_N": t.n, "BLOCK_K": t.k}, t.warps, t.stages, **{**moe, **operands})
    assert "wgmma" in made.asm["ptx"] and made.metadata.shared <= 227 * 1024
for t in DOWNS:
    made = build(moe_fp8._down_fp8_kernel, {
        "TILES_N": 2048 // t.n, "GROUP": t.group, "EACH": 1, "BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k}, t.warps, t.stages,
        **{**types, "h": tile(t.m, t.k), "w2": tile(t.n, t.k)})
    assert "wgmma" in made.asm["ptx"] and made.metadata.shared <= 227 * 1024
build(moe_fp8._level_kernel, {"TILES_N": 6, "BLOCK_T": 8, "BLOCK_N": 128, "ROWS": 8}, 4, 3, **moe)
for experts in (128, 512):
    common = {"HAS_MAP": True, "BLOCK_E": experts}
    build(align._count_kernel, {"BLOCK_N": 1024, **common}, 4, 3, **types)
    build(align._place_kernel, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_C": 16, "PLACES": True, **common}, 8, 3, **types)
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], env=env, capture_output=True, text=True, check=False,
                          timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "compiled"
