"""Kernel tests run on the GPU where there is one, else under Triton's interpreter (set before any kernel is built)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import quick_interpreter

    quick_interpreter.install()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20251)


_INTERPRETER_NOISE = (
    # triton 3.6 hands numpy 1-element arrays where it wants scalars
    "ignore:Conversion of an array with ndim:DeprecationWarning",
    # exp overflows to inf in a sigmoid, as on the device
    "ignore:overflow encountered in exp:RuntimeWarning",
    # rows that nobody reads are quantised as they lie in memory
    "ignore:invalid value encountered in divide:RuntimeWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors; the interpreter's own are not ours. Where there is a GPU, these are tests of the GPU."""
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            if torch.cuda.is_available():
                item.add_marker(pytest.mark.gpu)
            for noise in _INTERPRETER_NOISE:
                item.add_marker(pytest.mark.filterwarnings(noise))
