"""Kernels of the exchange are compiled for a GPU as they would be there, also where there is none: the interpreter takes what
the compiler may refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runtime.kernels import moe, replicas, symm

def build(kernel, constants, warps, **types):
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert made.asm["cubin"], kernel.__name__
    return made.asm["ptx"]

i32, i64 = "*i32", "*i64"
for world in (2, 8, 64):
    ptx = build(symm._meet_kernel, {"WORLD": world, "LANES": world, "POLLS": 64, "TIMED": True}, 1, bases=i64, turn=i32,
                present=i32, patience=i64, lost=i32, alarm=i32, off=i32)
    assert "globaltimer" in ptx and "release" in ptx and ptx.count("ld.volatile") >= 2
for ranks, places in ((2, 2), (8, 8), (144, 33)):
    lanes, wide = triton.next_power_of_2(ranks), max(triton.next_power_of_2(places), 2)
    names = ("first", "rank_of", "starts", "counts", "experts", "ranks", "rounds", "fills", "scratch", "slot_of")
    tables = dict.fromkeys(names, i32)
    build(replicas._pour_kernel, {"RANKS": ranks, "LANES": lanes, "BINS": 32, "P": places, "WIDE": wide, "SWEEPS": 2,
          "BLOCK": 1024}, 4, ids=i64, slots=i64, **tables)
    build(replicas._deal_kernel, {"RANKS": ranks, "BLOCK": 1024}, 4, ids=i64, slots=i64, **tables)
for fp8 in (False, True):
    shape = {"EXPERT_TP": 1, "CHOICES": 8, "LANES": 8}
    build(symm._push_kernel, {**shape, "WORLD": 8, "FP8": fp8, "BLOCK": 8192 if fp8 else 2048}, 8 if fp8 else 4, x="*bf16",
          slots=i64, weights="*fp32", bases=i64, sent=i64)
    build(symm._gather_sum_kernel, {**shape, "HOME": not fp8, "BLOCK": 2048}, 4, slots=i64, bases=i64, out="*bf16", fetched=i64)
for weights, out in (("*bf16", "*bf16"), ("*fp8e4nv", "*fp16")):  # fp8 rows widened in registers
    flags = {"CHOICES": 8, "ACTIVATION": 0, "HAS_SCALE": weights != out, "HAS_BIAS": False, "HAS_A_SCALE": True, "WIDEN": True,
             "IN_ORDER": False, "DIRECT": False, "EVEN_N": True, "EVEN_K": True, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}
    build(moe._up_kernel, flags, 4, x="*fp8e4nv", w13=weights, h=out, sorted_rows=i32, expert_ids=i32, num_padded=i32,
          scale="*fp32", bias="*fp32", a_scale="*fp32", alpha="fp32", limit="fp32")
print("compiled")
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "compiled"
