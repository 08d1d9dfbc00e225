"""The comparison with transformers runs the model it says, on a tiny one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.hf import hf_step_s
from runtime.tiny import tiny_config
from twin.spec.errors import SpecError
from twin.spec.hf import model_from_hf_config


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_step_of_transformers_takes_time(phase: str) -> None:
    model = model_from_hf_config(tiny_config("qwen3_moe", hidden=64, layers=2, vocab=64, context=64))
    seconds = hf_step_s(model, phase, 2, 16, device="cpu", dtype=torch.float32, repeats=1)
    assert 1e-5 < seconds < 10


def test_other_models_are_refused() -> None:
    model = model_from_hf_config(tiny_config("mixtral", hidden=64, layers=2, vocab=64, context=64))
    with pytest.raises(SpecError, match="Qwen3"):
        hf_step_s(model, "decode", 1, 8, device="cpu")
