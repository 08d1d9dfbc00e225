"""The profile of a GPU's operators: its form, and that a run which was cut short goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from runtime import gpu_operators
from runtime.gpu_calls import calls_of
from twin.cost.profile import load_profile
from twin.cost.work import work_of


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Points that were measured, by a device that takes a nanosecond for each element."""
    points: list[dict[str, int]] = []

    def calls(operator: str, attrs: dict[str, str], values: dict[str, int]) -> list[dict[str, int]]:
        points.append(values)
        return [values]

    peaks = dict.fromkeys(("bf16_flop_per_s", "fp8_flop_per_s", "hbm_bytes_per_s", "nvlink_bytes_per_s", "nic_bytes_per_s"), 1e12)
    monkeypatch.setattr(gpu_operators, "calls_of", calls)
    monkeypatch.setattr(gpu_operators, "time_calls", lambda found: (1e-6 + 1e-9 * found[0].get("k", 1), 0.02))
    monkeypatch.setattr(gpu_operators, "_peaks", lambda: peaks)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return points


def test_what_is_written_is_a_profile_that_the_cost_model_reads(tmp_path: Path, asked: list[dict[str, int]]) -> None:
    gpu_operators.measure(tmp_path / "p.json", 60.0, lambda line: None)
    profile = load_profile(tmp_path / "p.json")
    assert profile.gpu == "h200" and profile.engine == "eptwin"
    operators = {t.operator for t in profile.tables}
    assert operators == {"gemm", "attention_decode", "attention_prefill", "moe", "mla_decode", "mla_prefill", "norm", "quant",
                         "silu", "rope", "latent", "gate", "router", "replica_split"}
    assert sum(t.n_points for t in profile.tables) == len(asked)
    for table in profile.tables:
        for sheet in range(len(table.sheets)):
            work_of(table.operator, table.values(sheet), table.attrs)  # every value that a roofline needs is there


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path, asked: list[dict[str, int]]) -> None:
    out = tmp_path / "p.json"
    gpu_operators.measure(out, 60.0, lambda line: None)
    points = tmp_path / "p.points.json"
    whole, kept = out.read_text(), json.loads(points.read_text())
    lost = list(kept)[::7]
    points.write_text(json.dumps({key: value for key, value in kept.items() if key not in lost}))
    asked.clear()
    gpu_operators.measure(out, 0.0, lambda line: None)
    assert not asked and sum(t.n_points for t in load_profile(out).tables) == len(kept) - len(lost)
    gpu_operators.measure(out, 60.0, lambda line: None)
    assert len(asked) == len(lost) and out.read_text() == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_operators_run_no_faster_than_the_machine_allows(dtype: str) -> None:
    peaks = gpu_operators._peaks()
    values = {"m": 64, "n": 8192, "k": 4096}
    seconds, spread = gpu_operators.time_calls(calls_of("gemm", {"dtype": dtype}, values))
    floor = work_of("gemm", values, {"dtype": dtype}).hbm_bytes / peaks["hbm_bytes_per_s"]
    assert 0.95 * floor < seconds < 4 * floor and spread < 0.3
