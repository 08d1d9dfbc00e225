"""Records of single kernels: dense and grouped matrix products."""

from __future__ import annotations

import re

from twin.spec.plan import Plan, PoolPlan
from twin.validate.record_pools import evidence
from twin.validate.record_words import Found, Record, cluster_of

# Tables of fp8 products time the quantisation of their input too, a kernel of its own: 4.3 us where it is small (median of
# twelve products of 64 and 128 rows beside DeepGEMM's README), and a bf16 read and an fp8 write of every element.
QUANTISE_S = 4.3e-6
_GROUPED_WIDTH = 0.2  # half width of the 80% interval of grouped products, which no table has


def product_rate(record: Record) -> Found | str:
    """TFLOP/s of one product, from the profile's tables of dense ones. Products of several groups in one kernel fill the GPU
    with the tiles of all of them: as one of all rows, or as long as reading every group's weights takes."""
    sides = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", str(record.get("NK", "")))
    groups = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", str(record.get("groups_x_m", "")))
    if sides is None or ("M" not in record and groups is None):
        return "no product of stated sizes"
    count, m = (float(groups[1]), float(groups[2])) if groups else (1.0, float(record["M"]))
    n, k = float(sides[1]), float(sides[2])
    narrow = "bf16" if "bf16" in f"{record['metric']} {record.get('precision', '')}".lower() else "fp8_block"
    if "fp4" in f"{record['metric']} {record.get('precision', '')}".lower():
        narrow = "fp4"
    cluster = cluster_of(record, 1)
    gpu = cluster.groups[0].gpu
    plan = Plan(pools=(PoolPlan(role="mixed"),), engine="sglang")
    interpolator = evidence().interpolator(gpu, cluster.network, plan)
    curve = interpolator.curve("gemm", {"k": k, "n": n}, {"dtype": narrow}) if interpolator is not None else None
    if interpolator is None or curve is None:
        return "no table of products covers this GPU"
    one, flops = curve.estimate(m * count), 2 * m * count * n * k / 1e12
    weights_s = count * n * k * {"bf16": 2.0, "fp4": 0.5625}.get(narrow, 1.0) / gpu.hbm_bytes_per_s
    quantise_s = QUANTISE_S + 3.0 * m * count * k / gpu.hbm_bytes_per_s if narrow == "fp8_block" else 0.0
    least_s = max(weights_s, float(interpolator.peaks.roofline_s("gemm", {"m": m * count, "n": n, "k": k}, {"dtype": narrow})))
    value, low, high = (flops / max(s - quantise_s, least_s) for s in (one.seconds, one.high_s, one.low_s))
    if count > 1:
        return Found.near(value, max(_GROUPED_WIDTH, value / low - 1), "transferred")
    return Found(value, low, high, (str(one.source),))
