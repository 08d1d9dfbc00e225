"""Kernels for few rows compile for sm_90 as models ask for them, without spilling, also where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import pathlib
import re
import subprocess
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runtime import refine, tune
from runtime.kernels import gate, moe_rows, skinny

def build(kernel, constants, cut, asked=0, **types):
    # asked: bytes of weights that a program asks for before it waits
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    place = kernel.arg_names.index
    aligned = {(place(name),): [["tt.divisibility", 16]] for name, kind in signature.items()
               if kind[0] == "*" or (name in ("x_stride", "width") and not cut.dot)}
    source = ASTSource(kernel, signature, {(place(name),): value for name, value in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                          options={"num_warps": cut.warps, "num_stages": cut.stages, "launch_pdl": True})
    assert made.asm["cubin"] and "griddepcontrol.wait" in made.asm["ptx"], kernel.__name__
    assert made.metadata.shared < 200_000
    binary = pathlib.Path(sys.argv[1]) / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)], capture_output=True, text=True).stdout
    assert "STACK:0" in usage, (kernel.__name__, cut, usage[-200:])
    registers = int(usage.split("REG:")[1].split()[0])
    assert registers * 32 * cut.warps * max(1, cut.per_sm) <= 65536, (kernel.__name__, cut, registers)
    # what a chain reads of weights is on its way, 16 bytes a lane, before the forerunner's results are there
    before = made.asm["ptx"].partition("griddepcontrol.wait")[0]
    assert len(re.findall(r"ld\\.global\\S*v4\\.b32", before)) >= asked // (512 * cut.warps), (kernel.__name__, cut)

half = dict.fromkeys(("x", "w", "out", "residual", "gain", "bias", "w13", "h", "w2", "normed"), "*bf16")
floats = {"scale": "*fp32", "eps": "fp32", "weights": "*fp32", "alpha": "fp32", "limit": "fp32", "ids": "*i32"}
for cut in (*tune.LANES, *tune.TENSOR, *refine.ROWS):
    for narrow in (False, True):
        common = {"DEPTH": max(2048, cut.k), "NORM": True, "ADD": True, "HAS_SCALE": narrow, "HAS_BIAS": False, "EVEN_N": True,
                  "EVEN_K": True, "PDL": True, "EARLY": True, "BLOCK_N": cut.n, "BLOCK_K": cut.k}
        kernel = skinny._tile_kernel if cut.dot else skinny._vector_kernel
        build(kernel, common, cut, 0 if cut.dot else cut.n * cut.k * (1 if narrow else 2),
              **{**half, **floats, "w": "*fp8e4nv" if narrow else "*bf16"})
shape = {"HIDDEN": 2048, "WIDTH": 768, "CHOICES": 8, "HAS_SCALE": False, "HAS_BIAS": False, "EVEN_K": True, "PDL": True,
         "ONE": True}
for cut in (*tune.UP, *refine.STREAMS):
    kernel = moe_rows._up_stream_kernel if cut.per_sm else moe_rows._up_rows_kernel
    build(kernel, {**shape, "ACTIVATION": 0, "EVEN_N": True, "BLOCK_N": cut.n, "BLOCK_K": cut.k}, cut, **half,
          **{**floats, "experts": "i32"})
shape |= {"ADD": True, "EARLY": True}
for cut in tune.DOWN:
    build(moe_rows._down_rows_kernel, {**shape, "EVEN_K": False, "BLOCK_N": cut.n, "BLOCK_K": cut.k}, cut, **half, **floats)
for cut in refine.SIDE_BY_SIDE:
    build(moe_rows._down_side_by_side_kernel, {**shape, "BLOCK_N": cut.n, "BLOCK_K": cut.k, "AHEAD": cut.stages, "BLOCK_C": 8},
          cut, cut.n * 8 * cut.k * cut.stages * 2, **half, **floats)
for cut, ahead in ((cut, bytes_) for cut in (*tune.ROUTER, *refine.ROUTER) for bytes_ in (0, 20 << 20)):
    build(gate._norm_gate_kernel, {
        "HIDDEN": 2048, "HAS_LOGIT_BIAS": False, "HAS_SLOTS": True, "HAS_LOAD": True, "K": 8, "SIGMOID": False, "PDL": True,
        "EARLY": True, "AHEAD_BYTES": ahead, "RANKED": cut.warps >= 4,
        "RENORMALIZE": True, "HAS_BIAS": False, "GROUPS": 1, "TOPK_GROUPS": 1, "EACH": 128, "TOP2": True, "BLOCK_G": 1,
        "BLOCK_E": 128, "BLOCK_N": cut.n, "BLOCK_H": 2048}, cut, **{**half, **floats, "scale": "fp32", "logits": "*fp32",
        "logit_bias": "*fp32", "bias": "*fp32", "ahead": "*bf16", "arrived": "*i32", "slots": "*i64", "load": "*i64"})
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], env=env, capture_output=True, text=True, check=False,
                          timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "compiled"
