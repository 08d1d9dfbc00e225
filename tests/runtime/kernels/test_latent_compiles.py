"""Latent attention's kernels are compiled for Hopper as a GPU would have them, also where there is none: nothing spills, and
ptxas serialises no products."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from runtime.kernels import attention_mla, attention_mla_hopper, splits

POINTERS = {"q": "*bf16", "cache": "*bf16", "block_table": "*i32", "seq_lens": "*i32", "out": "*bf16", "parts": "*fp32",
            "lse": "*fp32", "scale_log2": "fp32"}

def build(source, kernel, constants, warps, stages=2, **types):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else {**POINTERS, **types}.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") or n == "heads"}
    made = triton.compile(source(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
                          target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    return made.asm["ptx"]

def complaints(ptx, arch="sm_90a"):
    with open(sys.argv[1], "w") as file:
        file.write(ptx)
    done = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", sys.argv[1], "-o", sys.argv[1] + ".o"],
                          capture_output=True, text=True, check=True)
    return done.stderr

shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
wide, narrow = (f"tensordesc<bf16[64, {columns}],{shared!r}>" for columns in (512, 64))
for groups in (1, 2):
    said = complaints(build(GluonASTSource, attention_mla_hopper._kernel, {"BLOCK_TOKENS": 64, "GROUPS": groups}, 8,
                            q_latent=wide, latent_desc=wide, q_rope=narrow, rope_desc=narrow))
    assert " 0 bytes spill stores" in said and "serialized" not in said, said
for block in (16, 32):
    build(ASTSource, attention_mla._mla_kernel, {"LATENT": 512, "ROPE": 64, "BLOCK_TOKENS": 64, "BLOCK_H": block, "BLOCK_N": 64,
          "GROUPS": 1}, 4, 5)
for count, columns in ((2, 512), (16, 512), (64, 128)):
    ptx = build(ASTSource, splits._merge_kernel, {"BLOCK_S": count, "BLOCK_D": columns}, 4)
    assert ("bar.sync" in ptx) == (columns < 512), "of 512 columns a thread holds every split of its own: nobody waits"
print("compiled")
"""


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "kernel.ptx")], env=env, capture_output=True, text=True,
                          check=False, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "compiled"
