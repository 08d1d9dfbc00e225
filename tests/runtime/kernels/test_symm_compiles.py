"""How often kernels of the exchange and of sums are compiled: once, whatever sizes steps have. Counted as the runtime counts
(`runtime.compiles`), the compiler made to believe in an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

class Device:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def map_python_to_cpp_type(self, kind): return kind

driver.set_active(Device())
launch = JITFunction.run
JITFunction.run = lambda self, *args, **kwargs: launch(self, *args, **{**kwargs, "warmup": True})  # compile and go no further

from runtime.compiles import compiles
from runtime.kernels import reduce, symm

compiles.listen()
HIDDEN, CHOICES, WORLD = 64, 4, 2
place = symm.Places(0, 1 << 20, 1 << 21, 1 << 22, 1 << 23, 1 << 24)
peers = symm.Peers(torch.zeros(WORLD, dtype=torch.int64), 1, WORLD, 1, 8)
limits = symm.Patience(torch.zeros(1, dtype=torch.int64), *(torch.zeros(n, dtype=torch.int32) for n in (3, 2, 1)))
moved, counters = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
shared = reduce.Shared(peers.bases_W, 1, WORLD, 0, 1 << 20, 1 << 21)

def step(tokens, capacity, which, dtype):
    x = torch.zeros(tokens, HIDDEN, dtype=dtype)
    slots, weights = torch.zeros(tokens, CHOICES, dtype=torch.int64), torch.zeros(tokens, CHOICES)
    for fp8 in (False, True):
        symm.push(x, slots, weights, peers, place, capacity, moved[:1], fp8=fp8)
    symm.meet(peers, place, counters[which:which + 1], counters, limits)
    came = torch.zeros(WORLD * capacity, CHOICES, dtype=torch.int32)
    symm.hand_back(torch.zeros(WORLD * capacity, HIDDEN, dtype=dtype), came, peers, place, capacity, home=True)
    symm.gather_sum(slots, x, peers, place, capacity, moved[1:], home=True)
    for gather in (False, True):
        reduce.share(x, torch.zeros((WORLD, *x.shape), dtype=dtype) if gather else x, shared, counters, limits, gather=gather)

first = None
for which, (tokens, capacity) in enumerate([(16, 16), (1, 1), (2, 3), (15, 16), (64, 64), (7, 100), (128, 128), (512, 512)]):
    step(tokens, capacity, which % 2, torch.bfloat16)
    first = first or compiles.total
    assert compiles.total == first == 7, (tokens, capacity, compiles.total)
print("once")
"""


def test_steps_of_any_size_take_the_kernels_of_the_first(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "once"
