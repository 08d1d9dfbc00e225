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
import subprocess
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runtime import tune
from runtime.kernels import gate, moe_rows, skinny

def build(kernel, constants, cut, **types):
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    place = kernel.arg_names.index
    aligned = {(place(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(kernel, signature, {(place(name),): value for name, value in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                          options={"num_warps": cut.warps, "num_stages": cut.stages, "launch_pdl": True})
    assert made.asm["cubin"] and "griddepcontrol.wait" in made.asm["ptx"], kernel.__name__
    assert made.metadata.shared < 200_000
    binary = pathlib.Path(sys.argv[1]) / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)], capture_output=True, text=True).stdout
    assert "STACK:0" in usage, (kernel.__name__, cut, usage[-200:])

half = dict.fromkeys(("x", "w", "out", "residual", "gain", "bias", "w13", "h", "w2", "normed"), "*bf16")
floats = {"scale": "*fp32", "eps": "fp32", "weights": "*fp32", "alpha": "fp32", "limit": "fp32", "ids": "*i32"}
for cut in (*tune.LANES, *tune.TENSOR):
    for narrow in (False, True):
        common = {"DEPTH": 2048, "NORM": True, "ADD": True, "HAS_SCALE": narrow, "HAS_BIAS": False, "EVEN_N": True,
                  "EVEN_K": True, "PDL": True, "BLOCK_N": cut.n, "BLOCK_K": cut.k}
        kernel = skinny._tile_kernel if cut.dot else skinny._vector_kernel
        build(kernel, common, cut, **{**half, **floats, "w": "*fp8e4nv" if narrow else "*bf16"})
shape = {"HIDDEN": 2048, "WIDTH": 768, "CHOICES": 8, "HAS_SCALE": False, "HAS_BIAS": False, "EVEN_K": True, "PDL": True}
for cut in tune.UP:
    build(moe_rows._up_rows_kernel, {**shape, "ACTIVATION": 0, "EVEN_N": True, "BLOCK_N": cut.n, "BLOCK_K": cut.k}, cut, **half,
          **{**floats, "experts": "i32"})
for cut in tune.DOWN:
    build(moe_rows._down_rows_kernel, {**shape, "ADD": True, "EVEN_K": False, "BLOCK_N": cut.n, "BLOCK_K": cut.k}, cut,
          **half, **floats)
for cut in tune.ROUTER:
    build(gate._norm_gate_kernel, {
        "HIDDEN": 2048, "HAS_LOGIT_BIAS": False, "HAS_SLOTS": True, "HAS_LOAD": True, "K": 8, "SIGMOID": False, "PDL": True,
        "RENORMALIZE": True, "HAS_BIAS": False, "GROUPS": 1, "TOPK_GROUPS": 1, "EACH": 128, "TOP2": True, "BLOCK_G": 1,
        "BLOCK_E": 128, "BLOCK_N": cut.n, "BLOCK_H": 2048}, cut, **{**half, **floats, "scale": "fp32", "logits": "*fp32",
        "logit_bias": "*fp32", "bias": "*fp32", "arrived": "*i32", "slots": "*i64", "load": "*i64"})
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
