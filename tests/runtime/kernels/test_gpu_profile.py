"""The profile of a GPU's operators: its form, and that a run which was cut short goes on where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from runtime import gpu_calls, gpu_operators
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
    assert operators == {"gemm", "attention_decode", "attention_prefill", "moe", "mla_decode", "mla_bmm", "mla_prefill", "norm",
                         "quant", "silu", "rope", "latent", "gate", "router", "replica_split"}
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


def test_absorbed_products_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries on latents with their rotary columns behind, and latents as values, head by head."""
    drawn: list[torch.Tensor] = []

    def randn(*shape: int) -> torch.Tensor:
        drawn.append(torch.randn(shape, dtype=torch.bfloat16))
        return drawn[-1]

    monkeypatch.setattr(gpu_calls, "_randn", randn)
    values = {"tokens": 3, "heads": 2}
    pre, post = (calls_of("mla_bmm", {"dtype": "bf16", "side": side}, values)[0] for side in ("pre", "post"))
    up, query, latents = drawn[2:5]
    got = pre().clone()
    want = torch.cat([torch.einsum("sqn,qnl->sql", query[..., :128].float(), up[:, :128].float()), query[..., 128:].float()], -1)
    assert got.shape == (3, 2, 576) and torch.allclose(got.float(), want, rtol=2e-2, atol=2e-1)
    half = len(drawn) // 2
    up, _, latents = drawn[half + 2:half + 5]
    got = post().transpose(0, 1)
    want = torch.einsum("sql,qvl->sqv", latents.float(), up[:, 128:].float())
    assert got.shape == (3, 2, 128) and torch.allclose(got.float(), want, rtol=2e-2, atol=2e-1)


def test_sheets_of_far_models_are_coarse_under_skew_alone() -> None:
    count: Counter[tuple[str, bool]] = Counter()
    for grid in gpu_operators.grids():
        for _, _, v in grid.points():
            if grid.operator == "moe" and grid.attrs["dtype"] == "bf16" and grid.most(v) <= 1:
                count[grid.attrs["distribution"], v["hidden"] == 3072] += 1
    assert count["balanced", True] == 17 and count["power_law_1.01", True] == 5
    assert count["balanced", False] > count["power_law_1.01", False] > 200


def test_a_kernel_that_does_not_take_a_shape_leaves_a_hole(tmp_path: Path, asked: list[dict[str, int]],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(operator: str, attrs: dict[str, str], values: dict[str, int]) -> list[dict[str, int]]:
        if values["width"] == 2048:
            raise AssertionError("too wide")
        return [values]

    monkeypatch.setattr(gpu_operators, "calls_of", calls)
    lines: list[str] = []
    gpu_operators.measure(tmp_path / "p.json", 60.0, lines.append, only=["norm"])
    (table,) = load_profile(tmp_path / "p.json").tables
    assert len(table.sheets) == 4 and sum("too wide" in line for line in lines) == 15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_operators_run_no_faster_than_the_machine_allows(dtype: str) -> None:
    peaks = gpu_operators._peaks()
    values = {"m": 64, "n": 8192, "k": 4096}
    seconds, spread = gpu_operators.time_calls(calls_of("gemm", {"dtype": dtype}, values))
    floor = work_of("gemm", values, {"dtype": dtype}).hbm_bytes / peaks["hbm_bytes_per_s"]
    assert 0.95 * floor < seconds < 4 * floor and spread < 0.3
