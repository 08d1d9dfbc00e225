"""Factors of measured deployments: which apply, and what they do to a step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from cost_cases import gqa_model, mla_model, pool_of

from twin.cost.batch import StepBatch
from twin.cost.deployments import NONE, SHIPPED, Deployments, keys_of, load_deployments
from twin.cost.model import CostModel
from twin.spec.errors import SpecError
from twin.spec.load import load_cluster
from twin.spec.plan import Plan, Precision

CLUSTER = load_cluster("h200-1x8")


def costs(deployments: Deployments | None, engine: str = "vllm") -> CostModel:
    pool = pool_of(tp=2)
    return CostModel(gqa_model(), CLUSTER, Plan(pools=(pool,), engine=engine), pool, deployments=deployments)  # type: ignore[arg-type]


def test_decode_and_prefill_have_factors_of_their_own() -> None:
    half = Deployments({("vllm", "qwen3_moe"): (math.log(1.5), math.log(3.0))})
    decode, prompts = StepBatch.decode([8], [8000]), StepBatch(*(np.array([x]) for x in (0.0, 0.0, 512.0, 131072.0, 1.0)))
    for batch, factor in ((decode, 1.5), (prompts, 3.0)):
        plain, slower = costs(NONE).step(batch), costs(half).step(batch)
        host = sum(s for key, s in plain.parts_s.items() if key.startswith("host/"))
        device = plain.total_s - host
        later = sum(s for key, s in slower.parts_s.items() if not key.startswith("host/"))
        assert later == pytest.approx(device * factor, rel=1e-9)
        assert costs(half).step_s(batch) == pytest.approx(slower.total_s, rel=1e-12)


def test_the_general_and_the_particular_multiply_and_strangers_take_one() -> None:
    keys = keys_of("vllm", CLUSTER.groups[0].gpu, gqa_model(), Precision(), pool_of(tp=2))
    found = Deployments({keys[0]: (0.1, 0.0), keys[2]: (0.2, -0.1)})
    assert found.factors(keys) == pytest.approx((0.3, -0.1))
    assert found.factors(keys_of("vllm", CLUSTER.groups[0].gpu, mla_model(), Precision(), pool_of(tp=2))) == (0, 0)
    assert found.factors(keys_of("sglang", CLUSTER.groups[0].gpu, gqa_model(), Precision(), pool_of(tp=2))) == (0, 0)
    assert keys[2] != keys_of("vllm", CLUSTER.groups[0].gpu, gqa_model(), Precision(), pool_of(dp=2))[2]


def test_what_ships_is_read_and_moderate() -> None:
    shipped = load_deployments()
    assert all(abs(x) < 1.0 for pair in shipped.log_factors.values() for x in pair)
    assert not any(key[0] == "eptwin" for key in shipped.log_factors), "our own engine is measured, not fitted"
    assert json.loads(SHIPPED.read_text(encoding="utf-8")).keys() >= {"entries"}


def test_intervals_widen_with_how_far_the_measured_is() -> None:
    gpu, other = CLUSTER.groups[0].gpu, load_cluster("a100").groups[0].gpu
    keys = keys_of("vllm", gpu, gqa_model(), Precision(), pool_of(tp=2))
    cut = keys_of("vllm", gpu, gqa_model(), Precision(), pool_of(tp=4))
    strange = keys_of("vllm", other, gqa_model(), Precision(), pool_of(tp=2))
    widths = {"configuration": (1.0, 2.0), "model": (2.0, 3.0), "engine": (3.0, 4.0), "nothing": (4.0, 5.0)}
    found = Deployments(dict.fromkeys(keys, (0.0, 0.0)), widths, separated=1.5)
    assert [found.near(k) for k in (keys, cut, strange)] == ["configuration", "model", "nothing"]
    assert Deployments({}, widths).near(keys) == "engine"
    assert found.widths_of(cut, separated=False) == (2.0, 3.0) and found.widths_of(cut, separated=True) == (2.0, 4.5)


def test_launches_of_prompts_grow_with_their_factor() -> None:
    """A short prompt without a CUDA graph waits for the host, whatever the device takes."""
    slow = Deployments({("vllm", "qwen3_moe"): (0.0, math.log(2.0))})
    prompt = StepBatch(*(np.array([x]) for x in (0.0, 0.0, 16.0, 64.0, 1.0)))
    assert costs(slow).site.engine.eager_launch_s == pytest.approx(2 * costs(NONE).site.engine.eager_launch_s)
    host_s = sum(s for key, s in costs(NONE).step(prompt).parts_s.items() if key == "host/overhead")
    assert costs(slow).step_s(prompt) - host_s == pytest.approx(2 * (costs(NONE).step_s(prompt) - host_s), rel=1e-6)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"entries": [{"key": ["vllm"]}]}', encoding="utf-8")
    with pytest.raises(SpecError, match="not a file of deployments"):
        load_deployments(path)
