"""Hopper's kernel for prompts compiles for sm_90 in every shape it takes, without spilling, also where there is no GPU."""

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
from triton.experimental.gluon._runtime import GluonASTSource
from runtime.kernels.attention_prefill_hopper import KEYS, _kernel

for dim, shared, windowed in ((128, False, False), (64, False, True), (128, True, False)):
    constants = {"HEADS": 8, "GROUP": 4, "DIM": dim, "SHARED": shared, "OUT": dim, "WINDOWED": windowed, "HAS_SINKS": windowed,
                 "KEYS": KEYS}
    data, whole = ("q", "k", "v", "rope", "out"), ("pieces",)
    types = dict.fromkeys(data, "*bf16") | dict.fromkeys(whole, "*i32") | {"sinks": "*fp32", "scale_log2": "fp32"}
    signature = {name: types.get(name, "i32") for name in _kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    place = _kernel.arg_names.index
    source = GluonASTSource(_kernel, signature, {(place(name),): value for name, value in constants.items()},
                            {(place(name),): [["tt.divisibility", 16]] for name in (*data, *whole)})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    binary = pathlib.Path(sys.argv[1]) / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)], capture_output=True, text=True).stdout
    assert "STACK:0" in usage and "LOCAL:0" in usage, (constants, usage[-200:])
    assert made.metadata.shared <= 227 * 1024 and "wgmma.mma_async" in made.asm["ptx"] and "cp.async.bulk" in made.asm["ptx"]
"""


@pytest.mark.slow
def test_they_compile(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], env=env, cwd=Path(__file__).parents[3],
                         capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
