"""Tables of experts as what they are: of ranks whose tokens all chose their own experts, of loads that fill every tile."""

from __future__ import annotations

import numpy as np
import pytest

from twin.cost.experts import _more_tiles
from twin.cost.local_experts import with_local
from twin.cost.profile import GpuPeaks, Profile, ProfileStore, Source, Table

SHAPE = ("hidden", "intermediate", "top_k", "experts", "moe_tp", "moe_ep")


def profile(engine: str, distribution: str = "balanced") -> Profile:
    attrs = {"layout": "fused", "dtype": "bf16", "gated": "yes", "distribution": distribution}
    table = Table(operator="moe", attrs=attrs, shape=SHAPE, sheets=((64, 32, 8, 256, 1, 1), (64, 32, 8, 256, 1, 16)),
                  axes={"tokens": (1.0, 64.0)}, seconds=((1e-4, 5e-4), (1e-5, 2e-5)))
    peaks = GpuPeaks(bf16_flop_per_s=1e15, hbm_bytes_per_s=4e12, nvlink_bytes_per_s=4e11, nic_bytes_per_s=5e10)
    return Profile(gpu="h200", engine=engine, engine_version="1", peaks=peaks, sources=(Source(name="test"),), tables=(table,))


def test_a_rank_of_several_is_a_rank_alone_with_its_share_of_the_experts() -> None:
    found = next(iter(with_local(ProfileStore((profile("sglang"),)))))
    local = next(table for table in found.tables if table.attrs["layout"] == "local")
    assert local.sheets == ((64, 32, 8, 16, 1, 1),) and local.seconds == ((1e-5, 2e-5),)
    assert len(found.tables) == 2, "the table stays for whoever asks as before"


def test_tables_that_count_what_a_rank_gets_stay_as_they_are() -> None:
    for other in (profile("trtllm"), profile("vllm", "power_law_1.01")):
        assert next(iter(with_local(ProfileStore((other,))))).tables == other.tables


def test_routing_leaves_half_of_each_expert_s_last_tile_empty() -> None:
    rows = np.array([1.0, 64.0, 128.0, 512.0, 8192.0])
    more = _more_tiles(rows)
    assert more[:2].tolist() == [1.0, 1.0]  # one tile either way
    rng = np.random.default_rng(0)
    drawn = np.ceil(rng.multinomial(512 * 256, np.full(256, 1 / 256), size=50) * rng.uniform(0.8, 1.2, (50, 256)) / 128).mean()
    assert more[3] == pytest.approx(drawn / 4, rel=0.03)
    assert more[2] > more[3] > more[4] == pytest.approx(1.0, rel=0.01)
