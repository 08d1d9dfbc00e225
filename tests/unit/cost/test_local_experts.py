"""Tables of several EP ranks whose tokens all chose the rank's own experts, as what they are."""

from __future__ import annotations

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
