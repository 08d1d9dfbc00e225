"""The profile file: strict, small, the same bytes for the same tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cost.profile_samples import PEAKS, gemm, profile
from twin.cost.efficiency import load_efficiency
from twin.cost.profile import dump_profile, gpu_key, load_profile, load_store, pack, unpack
from twin.cost.work import OPERATORS, causal_pairs, equivalent_tokens
from twin.spec.errors import SpecError


def test_round_trip_keeps_seconds_and_writes_the_same_bytes(tmp_path: Path) -> None:
    made = profile(gemm(noise=0.1))
    dump_profile(made, tmp_path / "a.json")
    back = load_profile(tmp_path / "a.json")
    dump_profile(back, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    np.testing.assert_allclose(back.tables[0].grid(0), made.tables[0].grid(0), rtol=2e-3)
    assert back.peaks == PEAKS
    assert not list(tmp_path.glob("*.tmp"))


@given(st.lists(st.none() | st.floats(1e-8, 9e4), max_size=5))
def test_seconds_are_packed_short_and_true(row: list[float | None]) -> None:
    text = pack(row)
    assert json.loads(json.dumps(text)) == text and len(json.dumps(text)) == 2 * len(row) + 2
    back = unpack(text)
    assert [b is None for b in back] == [s is None for s in row]
    assert all(math.isclose(b, s, rel_tol=2e-3) for b, s in zip(back, row, strict=True) if b is not None and s is not None)


@pytest.mark.parametrize(("change", "expected"), [
    ({"operator": "gemmm"}, "is not one of"),
    ({"axes": {"m": [2, 1], "n": [1], "k": [1]}}, "rise strictly"),
    ({"axes": {"m": [1, 2, 3], "n": [1], "k": [1]}}, "needs 3 seconds"),
    ({"seconds": [[None, None]]}, "without any measured point"),
    ({"seconds": [[-1.0, 1.0]]}, "greater than or equal to"),
    ({"seconds": [[1e-6, 1e-6], [1e-6, 1e-6]]}, "1 sheets but 2 rows"),
    ({"seconds": ["###"]}, "two characters a point"),
    ({"seconds": ["## !"]}, "never stands"),
    ({"surprise": 1}, "Extra inputs"),
    ({"spread": 11.0}, "less than or equal to 10"),
])
def test_a_wrong_table_is_refused_with_its_place(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    good = {"operator": "gemm", "axes": {"m": [1, 2], "n": [1], "k": [1]}, "seconds": [[1e-6, 2e-6]]}
    path = tmp_path / "p.json"
    document = json.loads(profile(gemm()).model_dump_json(exclude={"tables"}))
    path.write_text(json.dumps({**document, "tables": [good]}))
    assert load_profile(path).tables[0].n_points == 2
    path.write_text(json.dumps({**document, "tables": [{**good, **change}]}))
    with pytest.raises(SpecError, match=expected) as caught:
        load_profile(path)
    assert "tables.0" in str(caught.value)
    assert caught.value.file == str(path)


def test_a_file_that_is_not_a_profile_says_so(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\x00\xff")
    with pytest.raises(SpecError, match="Invalid JSON"):
        load_profile(tmp_path / "p.json")
    with pytest.raises(SpecError, match="cannot read"):
        load_profile(tmp_path / "absent.json")


@pytest.mark.parametrize(("name", "key"), [("NVIDIA H200", "h200"), ("h200-sxm-141gb", "h200"), ("GB200-NVL72", "gb200"),
                                           ("A100-SXM4-80GB", "a100"), ("H20-96G", "h20"), ("CPU", "cpu")])
def test_gpu_names(name: str, key: str) -> None:
    assert gpu_key(name) == key


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 80))
def test_causal_pairs_count_every_pair_once(new: int, past: int, window: int) -> None:
    counted = sum(min(past + i, window) for i in range(1, new + 1))
    assert causal_pairs(new, past, window) == pytest.approx(counted)


@given(st.integers(1, 5000), st.integers(0, 100_000), st.integers(0, 9000))
def test_equivalent_tokens_has_as_many_pairs(new: int, past: int, window: int) -> None:
    same = float(equivalent_tokens(new, past, window))
    whole = math.floor(same)
    pairs = float(causal_pairs(new, past, window))
    assert float(causal_pairs(whole, 0, window)) <= pairs * (1 + 1e-9) + 1e-6
    assert float(causal_pairs(whole + 1, 0, window)) >= pairs * (1 - 1e-9)


def test_shipped_profiles_are_small_credited_and_load() -> None:
    folder = Path("twin/cost/profiles")
    sizes = [path.stat().st_size for path in folder.glob("*.json")]
    assert len(sizes) >= 10
    assert max(sizes) < 1_000_000
    assert sum(sizes) < 4_000_000
    store = load_store()
    imported = {(g, e) for g in ("h100", "h200", "b200") for e in ("vllm", "sglang", "trtllm")}
    assert {(p.gpu, p.engine) for p in store} == imported | {("h200", "eptwin")}
    for shipped in store:
        assert {t.operator for t in shipped.tables} <= set(OPERATORS)
        assert all(t.spread is not None for t in shipped.tables if t.n_points > 50)
        if shipped.engine == "eptwin":  # our own measurements owe nobody credit, and one GPU measures no collective
            continue
        assert {s.license for s in shipped.sources} == {"Apache-2.0"}
        assert all(s.attribution for s in shipped.sources)
        assert {t.operator for t in shipped.tables} >= {"gemm", "attention_prefill", "attention_decode", "moe", "all_reduce"}


def test_a_store_of_some_gpus_only(tmp_path: Path) -> None:
    for gpu in ("h200", "h100"):
        dump_profile(profile(gemm(), gpu=gpu), tmp_path / f"{gpu}-vllm.json")
    (tmp_path / "efficiency.json").write_text("{}")
    assert [p.gpu for p in load_store(tmp_path)] == ["h100", "h200"]
    assert [p.gpu for p in load_store(tmp_path, ["NVIDIA H200"])] == ["h200"]
    assert [p.gpu for p in load_store(tmp_path, ["MI300X"])] == ["h100", "h200"]


def test_shipped_efficiencies_answer_by_gpu_engine_and_dtype() -> None:
    fits = load_efficiency()
    gemm_fit = fits.find("NVIDIA H200", "gemm", "bf16", "trtllm")
    assert gemm_fit is not None
    assert gemm_fit.engine == "trtllm"
    assert gemm_fit.compute is not None and 0.5 < gemm_fit.compute < 1
    assert gemm_fit.memory is not None and 0.5 < gemm_fit.memory <= 1
    assert 1e-6 < gemm_fit.launch_s < 10e-6
    other = fits.find("h200", "gemm", "fp8_block", "vllm")  # that engine's own was bound by its host
    assert other is not None and not other.host_bound
    assert fits.find("h200", "gemm", "fp4") is None
