"""Import of Parquet tables: each unit and each convention, on a small tree laid out as the wheel's is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twin.cost.profile import Profile, Table
from twin.cost.silicon import import_silicon
from twin.spec.errors import SpecError

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")

YAML = """
gpu: {mem_bw: 4800000000000, bfloat16_tc_flops: 989000000000000, fp8_tc_flops: 1978000000000000}
node: {num_gpus_per_node: 8, intra_node_bw: 450000000000, inter_node_bw: 50000000000}
"""


def put(root: Path, place: str, **columns: list[Any]) -> None:
    n = len(next(v for v in columns.values() if isinstance(v, list)))
    whole = {"framework": "X", "version": "1", "device": "NVIDIA H200", "op_name": "op", "kernel_source": "k", **columns}
    path = root / "data" / "h200_sxm" / f"{place}_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v if isinstance(v, list) else [v] * n for k, v in whole.items()}), path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "h200_sxm.yaml").write_text(YAML)
    put(tmp_path, "gemm/vllm/0.9.0/gemm", gemm_dtype="bfloat16", m=[1], n=[64], k=[64], latency=[9.0])
    put(tmp_path, "gemm/vllm/0.24.0/gemm", gemm_dtype=["bfloat16", "bfloat16", "nvfp4"], m=[1, 2, 1], n=[64, 64, 64],
        k=[64, 64, 64], latency=[0.002, 0.004, 0.001])
    return tmp_path


def read(root: Path) -> Profile:
    (profile,) = import_silicon(root, ["h200_sxm"], ["vllm"])
    return profile


def find(profile: Profile, operator: str, **attrs: str) -> Table:
    (table,) = [t for t in profile.tables if t.operator == operator and attrs.items() <= t.attrs.items()]
    return table


def test_newest_version_milliseconds_and_our_names(root: Path) -> None:
    profile = read(root)
    assert (profile.gpu, profile.engine_version) == ("h200", "0.24.0")
    assert profile.peaks.flop_per_s("fp4") == 1978e12  # no fp4 cores: the next wider rate
    assert find(profile, "gemm", dtype="bf16").grid(0)[:, 0, 0].tolist() == [0.002e-3, 0.004e-3]
    assert find(profile, "gemm", dtype="fp4").axes["m"] == (1.0,)
    assert profile.sources[0].license == "Apache-2.0"
    (old,) = import_silicon(root, ["h200_sxm"], ["vllm"], version="0.9.0")
    assert find(old, "gemm").grid(0).item() == pytest.approx(9.0e-3)


def test_nccl_sizes_are_elements_and_become_bytes(root: Path) -> None:
    put(root, "comm/nccl/2.29/nccl", op_name=["alltoall", "alltoall", "all_reduce"], nccl_dtype=["half", "int8", "half"],
        num_gpus=[8, 8, 8], message_size=[1024, 1024, 4096], latency=[0.01, 0.02, 0.03])
    profile = read(root)
    assert find(profile, "all_to_all").axes["bytes"] == (2048.0,)
    assert find(profile, "all_to_all").grid(0).item() == pytest.approx(10e-6)
    assert find(profile, "all_reduce", backend="nccl").axes["bytes"] == (8192.0,)


def test_deepep_microseconds_phases_and_older_multi_node_runs(root: Path) -> None:
    low = {"hidden_size": 7168, "num_topk": 8, "num_experts": 256, "num_token": [128]}
    put(root, "comm/vllm/0.12.0/wideep_deepep_ll", node_num=1, dispatch_avg_t_us=[40.0], combine_avg_t_us=[70.0], **low)
    put(root, "comm/vllm/0.5.0/wideep_deepep_ll", node_num=[1, 4], dispatch_avg_t_us=[99.0, 143.0],
        combine_avg_t_us=[99.0, 263.0], **{**low, "num_token": [128, 128]})
    tables = [t for t in read(root).tables if t.operator == "dispatch"]
    seconds = {t.sheets[0][t.shape.index("ep")]: t.grid(0).item() for t in tables}
    assert seconds == {8.0: pytest.approx(40e-6), 32.0: pytest.approx(143e-6)}  # the older one-node run is superseded
    assert ["H100" in t.source for t in sorted(tables, key=lambda t: t.sheets[0])] == [False, True]
    assert {t.attrs["mode"] for t in tables} == {"low_latency"}


def test_normal_mode_adds_the_notification(root: Path) -> None:
    put(root, "comm/vllm/0.12.0/wideep_deepep_normal", node_num=2, hidden_size=7168, num_topk=8, num_experts=256,
        num_token=[4096], dispatch_sms=20, dispatch_transmit_us=[800.0], dispatch_notify_us=[43.0], combine_sms=20,
        combine_transmit_us=[1500.0], combine_notify_us=[7.0])
    profile = read(root)
    assert find(profile, "dispatch").grid(0).item() == pytest.approx(843e-6)
    assert find(profile, "combine").grid(0).item() == pytest.approx(1507e-6)


def test_attention_windows_and_context(root: Path) -> None:
    put(root, "attention/vllm/0.24.0/generation_attention", batch_size=4, isl=1, step=[1023, 1023], num_heads=64,
        num_key_value_heads=8, head_dim=64, attn_dtype="bfloat16", kv_cache_dtype="fp8", window_size=[0, 128],
        latency=[0.02, 0.01])
    table = find(read(root), "attention_decode", kv_dtype="fp8")
    assert table.axes["context"] == (1024.0,)
    assert [s[table.shape.index("window")] for s in table.sheets] == [128.0, 2.0**20]


def test_kernels_are_merged_unless_the_same_shape_was_measured_with_both(root: Path) -> None:
    moe = {"moe_dtype": "fp8_block", "hidden_size": 7168, "inter_size": 2048, "topk": 8, "num_experts": 256, "moe_tp_size": 1,
           "moe_ep_size": 8, "distribution": "balanced"}
    put(root, "moe/vllm/0.24.0/moe", kernel_source=["small", "large"], num_tokens=[1, 4096], latency=[0.1, 2.0], **moe)
    merged = find(read(root), "moe")
    assert "kernel" not in merged.attrs and merged.n_points == 2
    put(root, "moe/vllm/0.24.0/moe", kernel_source=["a", "b"], num_tokens=[1, 1], latency=[0.1, 0.2], **moe)
    assert find(read(root), "moe", kernel="a").grid(0).item() == pytest.approx(1e-4)
    assert find(read(root), "moe", kernel="b").grid(0).item() == pytest.approx(2e-4)


def test_a_table_measured_without_graphs_is_marked(root: Path) -> None:
    put(root, "gemm/vllm/0.25.0/gemm", gemm_dtype=["fp8_block"] * 3 + ["bfloat16"] * 3, m=[32, 64, 8192] * 2, n=[2048] * 6,
        k=[2048] * 6, latency=[0.085, 0.086, 0.3, 0.012, 0.012, 0.4])
    profile = read(root)
    assert find(profile, "gemm", dtype="fp8_block").host_bound
    assert not find(profile, "gemm", dtype="bf16").host_bound


@pytest.mark.parametrize(("systems", "engines"), [(["h999"], ["vllm"]), (["h200_sxm"], ["tgi"])])
def test_unknown_names_are_refused(root: Path, systems: list[str], engines: list[str]) -> None:
    with pytest.raises(SpecError, match="no measured tables"):
        import_silicon(root, systems, engines)
