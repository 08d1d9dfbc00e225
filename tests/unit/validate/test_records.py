"""Published records: words as people write them, deployments nobody has published, and what must hold of any answer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from twin.spec.errors import SpecError
from twin.validate.record_comm import exchange_latency, kv_transfer, logical_bandwidth
from twin.validate.record_kinds import ANSWERS, kind_of
from twin.validate.record_pools import asked, expert_loads, moved, rank_excess, redundant_slots
from twin.validate.record_words import Found, cluster_of, model_named, number, precision_of_record, preset_of, ranks_of, stated
from twin.validate.records import Judged, _judge, overlap_gains, summarise_records
from twin.validate.words import model_of

DECODE = {"metric": "output_throughput", "unit": "tok/s/GPU", "phase": "decode", "isl": 2000, "osl": 100, "batch_per_gpu": 128}
PREFILL = {"metric": "input_throughput", "unit": "tok/s/GPU", "phase": "prefill", "isl": 4096, "batch_per_gpu": "16384 tok/GPU"}
WIDE = {"model": "deepseek-r1", "gpu": "H100-80G", "ep": 72, "features": {"TBO": True, "EPLB": True, "redundant_experts": 32}}


def value(record: dict[str, Any]) -> float:
    found = ANSWERS[kind_of(record)](record)
    assert isinstance(found, Found), found
    assert 0 < found.low <= found.value <= found.high
    return found.value


@pytest.mark.parametrize(("text", "preset"), [("NVIDIA H200 141GB", "h200"), ("H20-96G", "h20-96g"), ("H20-3e", "h20-141g"),
                                              ("GB200 NVL72", "gb200-nvl72"), ("8xH100 SXM", "h100"), ("SM100 CX7", "b200")])
def test_gpus_are_known_by_the_names_people_write(text: str, preset: str) -> None:
    assert preset_of({"gpu": text}) == preset


@pytest.mark.parametrize(("text", "model"), [("deepseek-v3/r1", "deepseek-v3"), ("DeepSeek-R1 (0528)", "deepseek-r1"),
                                             ("Kimi K2 Instruct", "kimi-k2"), ("zai-org/GLM-4.6-FP8", "glm-4.5"),
                                             ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "qwen3-235b-a22b-fp8")])
def test_models_are_known_by_the_names_people_write(text: str, model: str) -> None:
    found = model_named({"model": text})
    assert (found.hidden, found.layers) == (model_of(model).hidden, model_of(model).layers)


def test_what_is_not_known_says_so() -> None:
    for record in ({**DECODE, **WIDE, "gpu": "TPU v7"}, {**DECODE, **WIDE, "model": "mystery-9t"}):
        with pytest.raises(SpecError):
            asked(record)
    reason = _judge({**DECODE, "model": "deepseek-r1", "gpu": "H200"}, 0).reason
    assert "without its deployment" in reason


def test_sizes_networks_and_formats() -> None:
    assert [number(text) for text in ("16384 tok/GPU", "16k", "1,024", 256)] == [16384, 16384, 1024, 256]
    four = cluster_of({"gpu": "H20", "network": "4x400Gb RDMA"}, 16).network
    efa = cluster_of({"gpu": "H200", "network": "EFA 16x200Gb p5en"}, 16).network
    assert (four.nics_per_node, four.nic_bytes_per_s) == (4, 50e9) and efa.nics_per_node * efa.nic_bytes_per_s == 400e9
    assert precision_of_record({"precision": "NVFP4 MoE, FP8 KV"}).experts == "fp4"
    assert precision_of_record({"precision": "BF16"}).weights == "bf16"
    assert ranks_of({"gpus": 32, "tp": 2, "dp": 16, "ep": 32}) == (16, 2, 32) and ranks_of({"gpus": 96}) == (96, 1, 96)
    assert [redundant_slots(e, ep, r) for e, ep, r in ((256, 72, 32), (256, 56, 32), (384, 96, 0), (160, 144, 0))] == \
        [32, 24, 0, 128]


def test_drafts_and_their_acceptance() -> None:
    said = stated({"features": {"MTP": "simulated, accept 60%, 256 tok/GPU/step"}}, "decode", 72)
    assert (said.drafts, said.drafted, said.acceptance) == (1, False, 0.6)
    assert stated({"features": {"MTP": 3}, "note": "accepted 0.85"}, "decode", 8).drafts == 3
    assert stated({"features": {"MTP": False}}, "decode", 72).drafts == 0
    drafted, simulated = ({**DECODE, **WIDE, "features": {**WIDE["features"], "MTP": kind}} for kind in (1, "simulated"))
    assert value({**simulated, "note": "accept 70%"}) > value({**drafted, "note": "accept 70%"}) > value({**DECODE, **WIDE})


SHAPES = [("Kimi K2", "H200", 96), ("qwen3-235b-a22b-fp8", "H100", 16), ("deepseek-r1", "GB200 NVL72", 56),
          ("deepseek-r1", "H20", 16), ("glm-4.5", "H800", 32), ("deepseek-v3", "H800", 144), ("deepseek-v3", "B200", 8)]


@pytest.mark.parametrize(("model", "gpu", "ep"), SHAPES)
def test_decode_of_any_shape_grows_with_its_batch_inside_the_roofline(model: str, gpu: str, ep: int) -> None:
    last_rate = last_s = 0.0
    for batch in (8, 32, 128, 512):
        ask = asked({**DECODE, "model": model, "gpu": gpu, "ep": ep, "batch_per_gpu": batch, "features": {"EPLB": True}})
        step = ask.step()
        rate, hardware = ask.tokens / step.total_s, ask.costs.site.gpu
        assert rate > last_rate and step.total_s > last_s
        kv_s = batch * 2050 * ask.costs.model.kv_bytes_per_token("bf16") / hardware.hbm_bytes_per_s
        flop_s = 2 * ask.costs.model.active_params * batch / (hardware.fp8_flop_per_s or hardware.bf16_flop_per_s)
        assert step.total_s > max(kv_s, flop_s)
        last_rate, last_s = rate, step.total_s


@pytest.mark.parametrize(("model", "gpu", "ep"), [s for s in SHAPES if s[1] in ("H200", "H100", "B200", "H800")])
def test_prefill_of_any_shape_is_inside_the_roofline(model: str, gpu: str, ep: int) -> None:
    rates = []
    for tokens in (2048, 16384):
        ask = asked({**PREFILL, "model": model, "gpu": gpu, "ep": ep, "batch_per_gpu": tokens})
        rates.append(ask.tokens / ask.step().total_s)
        assert rates[-1] * 2 * ask.costs.model.active_params < 0.75 * ask.costs.site.gpu.fp8_flop_per_s
    assert rates[1] > 0.95 * rates[0]


def test_units_of_throughput() -> None:
    gpu, node, user, whole = (value({**DECODE, **WIDE, "gpus": 72, "unit": f"tok/s{per}"})
                              for per in ("/GPU", "/node", "/user", ""))
    assert (node, user, whole) == (pytest.approx(8 * gpu), pytest.approx(gpu / 128), pytest.approx(72 * gpu))
    itl = value({**DECODE, **WIDE, "metric": "itl", "unit": "ms"})
    assert itl == pytest.approx(1e3 / user)


def test_overlap_gains_are_read_from_pairs_and_asked_alone() -> None:
    then = {**WIDE, "date": "2025-05-05"}
    pair = [{**DECODE, **then, "id": str(tbo), "value": speed, "features": {**WIDE["features"], "TBO": tbo}}
            for tbo, speed in ((True, 2150), (False, 1875))]
    gain, = summarise_records([_judge(record, 0) for record in pair])["overlap_gains"]
    assert gain["published"] == pytest.approx(2150 / 1875 - 1) and abs(gain["error"]) < 0.2
    asked_alone = value({**then, **{k: DECODE[k] for k in ("isl", "osl", "batch_per_gpu")}, "phase": "decode",
                         "metric": "tbo_gain", "unit": "fraction"})
    assert asked_alone == pytest.approx(gain["predicted"], rel=1e-6)
    small = {**WIDE, "phase": "decode", "isl": 2000, "batch_per_gpu": 32, "metric": "tbo_speedup", "unit": "ratio"}
    assert value(small) < 1
    lone = Judged("x", "throughput", "output_throughput", "tok/s", 1.0, None)
    assert overlap_gains([lone]) == []


def test_experts_are_more_even_with_eplb_on_fewer_ranks_and_in_batches_of_many_prompts() -> None:
    model = model_of("deepseek-v3")
    def excess(ep: int, eplb: bool, prompts: float) -> float:
        loads = expert_loads(model, ep, 32 * eplb, max(1, ep // 8), moved("prefill", eplb, prompts), eplb)
        return float(np.mean(rank_excess(*loads)))
    assert 1 < excess(8, True, 1e9) < excess(32, True, 1e9) < excess(32, False, 1e9)
    assert excess(32, True, 1e9) < excess(32, True, 64)
    assert moved("decode", True, 1) == 0.14 and moved("decode", False, 1) == 0
    perfect, published = (value({**PREFILL, **WIDE, "ep": 32, "note": note}) for note in ("simulated perfect balance", ""))
    assert perfect > published


def test_layer_parts_of_a_step() -> None:
    def part(name: str, tbo: bool, phase: str = "decode") -> float:
        base = DECODE if phase == "decode" else PREFILL
        return value({**base, **WIDE, "ep": 32, "features": {"TBO": tbo, "EPLB": True}, "unit": "ms/layer",
                      "metric": f"{phase}_layer_time_{name}"})
    parts = ("dispatch", "combine", "moe_gemm", "attention_core", "other_gemm", "other")
    assert sum(part(name, False) for name in parts) == pytest.approx(part("overall", False), rel=0.06)
    assert part("combine", True) < part("combine", False)
    assert part("combine_barrier", False, "prefill") > part("dispatch_barrier", False, "prefill")
    judged = _judge({**DECODE, **WIDE, "metric": "decode_layer_time_comm_launch", "unit": "ms"}, 0)
    assert judged.found is None and "not parts of their own" in judged.reason


EXCHANGE = {"model": "deepep-microbench", "topk": 8, "experts": 256, "hidden": 7168, "tokens_per_gpu": 128, "date": "2025-06-05"}


def test_single_exchanges() -> None:
    def microseconds(**changes: Any) -> float:
        found = exchange_latency({**EXCHANGE, "gpu": "H200", "ep": 8, "metric": "dispatch_latency", **changes})
        assert isinstance(found, Found)
        return found.value
    assert microseconds(tokens_per_gpu=1, hidden=2048) < microseconds(tokens_per_gpu=1, hidden=7168)
    assert microseconds(gpu="H800") > microseconds() > microseconds(gpu="B200")
    assert microseconds(date="2025-02-25") > 1.5 * microseconds() == 1.5 * microseconds(date="2025")
    both = microseconds(metric="dispatch+combine_latency")
    assert both == pytest.approx(microseconds() + microseconds(metric="combine_latency"))
    inside = logical_bandwidth({**EXCHANGE, "gpu": "SM100 NVLink", "ep": 8, "metric": "dispatch_logical_bandwidth"})
    across = logical_bandwidth({**EXCHANGE, "gpu": "SM100 CX7", "ep": 32, "metric": "dispatch_logical_bandwidth"})
    assert isinstance(inside, Found) and isinstance(across, Found)
    assert inside.value == pytest.approx(643, rel=0.12) and across.value == pytest.approx(61, rel=0.1)


def test_kv_of_a_model_and_a_prompt_is_worth_more_than_a_rounded_size() -> None:
    record = {"model": "qwen3-8b", "gpu": "H800", "tp": 8, "isl": 32768, "network": "8xCX7 RoCE", "metric": "kv_transfer_time"}
    exact, rounded = kv_transfer(record), kv_transfer({**record, "model": None, "kv_mb": 4608})
    assert isinstance(exact, Found) and isinstance(rounded, Found)
    assert exact.value == pytest.approx(rounded.value, rel=0.01)
    slow = kv_transfer({"size_bytes": 2**32, "network": "200Gb/s", "metric": "kv_transfer_time"})
    assert isinstance(slow, Found) and slow.value == pytest.approx(360, rel=0.1)


def test_cached_prompts_count_and_cost_little() -> None:
    plain = {**PREFILL, "model": "deepseek-r1", "gpu": "H800", "ep": 32}
    held = {**plain, "note": "cache hits of 50%"}
    assert value(plain) * 1.5 < value(held) < value(plain) * 2.5
    assert asked({**held, "note": "", "cache_hit_rate": 0.5}).tokens == asked(held).tokens == 2 * asked(plain).tokens


def test_whole_services_and_dense_models_are_answered_too() -> None:
    loop = {"model": "deepseek-r1", "gpu": "H200", "gpus": 8, "tp": 8, "phase": "mixed", "isl": 1024, "osl": 1024,
            "concurrency": 64,
            "backend": "sglang 0.5.9", "metric": "output_throughput", "unit": "tok/s"}
    tpot = value({**loop, "metric": "tpot", "unit": "ms"})
    assert 0.8 * 64e3 / tpot < value(loop) < 64e3 / tpot
    assert value({**loop, "unit": "tok/s/GPU"}) == pytest.approx(value(loop) / 8)
    dense = {**DECODE, "model": "qwen3-32b", "gpu": "H100", "gpus": 4, "tp": 4, "batch_per_gpu": None, "concurrency": 64}
    assert value({**dense, "concurrency": 128}) > value(dense) > 0


EXCHANGE = {"model": "deepep-microbench", "gpu": "H800", "ep": 16, "gpus": 16, "tokens_per_gpu": 128, "unit": "us",
            "note": "DeepEP low latency"}
LOOP = {"model": "qwen3-235b-a22b-fp8", "gpu": "NVIDIA H200 141GB", "tp": 8, "gpus": 8, "isl": 1024, "osl": 1024,
        "concurrency": 16, "backend": "vllm 0.11"}


@pytest.mark.parametrize(("metric", "kind"), [
    ("mean_tpot", "serving"), ("itl_p50", "step"), ("decode_step_time", "step"), ("tokens_per_second_per_gpu", "throughput"),
    ("max_over_mean_rank_load", "balance"), ("per_expert_max_over_mean_layer_avg", "popularity"),
    ("kv_transfer_latency", "kv transfer"), ("allreduce_busbw", "bus bandwidth"), ("eplb_throughput_gain", "eplb gain"),
    ("dispatch_rdma_bandwidth", "copies bandwidth"),
    ("free_kv_memory", "memory"), ("disk_kv_cache_hit_rate", "other")])
def test_metrics_are_known_by_the_names_people_write(metric: str, kind: str) -> None:
    assert kind_of({"metric": metric, "unit": "tokens/s/GPU"}) == kind


@pytest.mark.parametrize(("record", "units", "ratio"), [
    ({**DECODE, **WIDE, "metric": "decode_step_time"}, ("s", "ms"), 1e3),
    ({**EXCHANGE, "metric": "dispatch_latency"}, ("ms", "us"), 1e3),
    ({**LOOP, "metric": "tpot"}, ("s", "ms"), 1e3),
    ({"model": "nccl", "gpu": "H100", "gpus": 16, "op": "all_to_all", "message_bytes": 2**26, "metric": "latency"},
     ("ms", "us"), 1e3),
    ({"model": "kimi-k2", "gpu": "H200", "tp": 8, "isl": 8192, "metric": "kv_transfer_time"}, ("s", "us"), 1e6),
    ({"model": "deepseek-v3", "metric": "kv_cache_bytes_per_token"}, ("KB", "bytes"), 1e3),
    ({**DECODE, **WIDE, "metric": "decode_layer_time_moe_gemm"}, ("ms/layer", "us/layer"), 1e3)])
def test_the_unit_is_the_record_s(record: dict[str, Any], units: tuple[str, str], ratio: float) -> None:
    first, second = (value({**record, "unit": unit}) for unit in units)
    assert second == pytest.approx(ratio * first)


def test_exchanges_of_formats_and_libraries() -> None:
    one = {**EXCHANGE, "metric": "dispatch_latency"}
    fp8, bf16 = (value({**one, "precision": text}) for text in ("FP8 dispatch", "BF16 dispatch"))
    assert 1.5 * fp8 < bf16 < 2 * fp8
    copies = value({**EXCHANGE, "metric": "dispatch_bandwidth", "unit": "GB/s"})
    assert copies == pytest.approx(128 * 8 * 7168 * (1 + 4 / 128) / fp8 / 1e3)
    garden = {**EXCHANGE, "model": "a2a-microbench", "note": "", "source": "pplx-garden", "metric": "combine_latency"}
    cx7, efa = value(garden), value({**garden, "network": "EFA 16x200Gb"})
    assert efa > cx7 > 0
    rack = value({**garden, "source": "flashinfer mnnvl", "gpu": "GB200 NVL72", "ep": 64})
    assert rack < cx7, "64 ranks of one NVLink domain beat 16 over NICs"
    assert "replaced" in _judge({**garden, "source": "pplx-kernels", "id": "pplx-kernels"}, 0).reason


def test_gains_are_ratios_of_what_throughputs_say() -> None:
    pool = {**PREFILL, "model": "deepseek-v3", "gpu": "H100", "ep": 32, "features": {"TBO": True}}
    on, off = (value({**pool, "features": {"TBO": True, "EPLB": eplb, "redundant_experts": 32 * eplb}}) for eplb in (True, False))
    gain = value({**pool, "metric": "eplb_speedup", "unit": "x"})
    assert gain == pytest.approx(on / off) and gain > 1.05
    assert value({**pool, "metric": "eplb_gain", "unit": "%"}) == pytest.approx(100 * (gain - 1))
    drafted = {**DECODE, "model": "deepseek-v3", "gpu": "H200", "ep": 32, "batch_per_gpu": 8, "note": "acceptance 0.8"}
    assert 1.1 < value({**drafted, "metric": "mtp_speedup", "unit": "x", "features": {"MTP": 1}}) < 1.8


def test_memory_and_kernels() -> None:
    deployed = {"model": "deepseek-v3", "gpu": "H200", "source": "vLLM", "unit": "GB/GPU"}
    few, many = (value({**deployed, "metric": "free_kv_memory", "id": f"kv-{name}"}) for name in ("dpep8", "dpep16"))
    assert 0 < few < many < 141
    assert value({**deployed, "metric": "weights_per_gpu", "ep": 16}) > value({**deployed, "metric": "weights_per_gpu", "ep": 64})
    product = {"metric": "fp8_tflops", "unit": "TFLOPS", "gpu": "H800", "NK": "4096x7168"}
    assert value({**product, "M": 64}) < value({**product, "M": 4096}) < 1979
    grouped = value({**product, "groups_x_m": "4x256"})
    assert value({**product, "M": 64}) < grouped < value({**product, "groups_x_m": "4x8192"}) < 1979


def test_a_prompt_batch_stated_per_gpu_is_every_gpu_s() -> None:
    pool = {**PREFILL, "model": "qwen3-235b-a22b-fp8", "gpu": "H800", "ep": 16, "batch_per_gpu": 2048}
    wide, cut = asked({**pool, "dp": 16}), asked({**pool, "dp": 4, "tp": 4})
    assert wide.tokens == cut.tokens == 2048 and cut.batch.prefill_tokens[0] == 4 * 2048


def test_vllm_across_nodes_is_told_its_all_to_all() -> None:
    for ep, name in ((8, "ag_rs"), (32, "deepep_low_latency")):
        costs = asked({**DECODE, "model": "deepseek-r1", "gpu": "GB200 NVL72", "ep": ep, "dp": ep, "engine": "vllm"}).costs
        assert costs.site.protocol.name == name


def test_deployments_ran_the_libraries_of_their_day() -> None:
    """Low latency kept off NVLink until May 2025; vLLM's overlap of prompts hid one exchange of four until March 2026."""
    decode = {"model": "deepseek-v3", "gpu": "H100", "ep": 16, "metric": "output_throughput", "unit": "tok/s/GPU", "isl": 2000,
              "batch_per_gpu": 128, "features": {"TBO": False, "EPLB": True}}
    assert value({**decode, "date": "2025-05-05"}) < value({**decode, "date": "2025-07-01"}) == value(decode)
    prefill = {**decode, "metric": "input_throughput", "backend": "vllm", "batch_per_gpu": 8192, "features": {"DBO": True}}
    assert value({**prefill, "date": "2025-12-17"}) < value({**prefill, "date": "2026-06-01"}) == value(prefill)


def test_a_throughput_without_a_batch_is_of_a_full_memory() -> None:
    rate = {"model": "deepseek-v3", "gpu": "H200", "ep": 32, "metric": "output_throughput", "unit": "tok/s/GPU", "isl": 2000,
            "osl": 2000, "features": {"TBO": True, "EPLB": True}}
    open_one, stated_one = ANSWERS["throughput"](rate), ANSWERS["throughput"]({**rate, "batch_per_gpu": 256})
    assert isinstance(open_one, Found) and isinstance(stated_one, Found)
    assert value({**rate, "batch_per_gpu": 128}) < open_one.value
    assert open_one.high / open_one.low > stated_one.high / stated_one.low
    assert value({**rate, "osl": 12000}) < 0.6 * open_one.value  # longer sequences, fewer of them
    assert value({**rate, "gpu": "H100", "ep": 8}) == value({**rate, "gpu": "H100", "ep": 8, "batch_per_gpu": 128})  # never fits


def test_a_metric_says_whose_throughput_it_is() -> None:
    record = {"model": "deepseek-v3", "gpu": "H200", "ep": 32, "isl": 2000, "batch_per_gpu": 128, "phase": "decode"}
    assert value({**record, "metric": "tps_per_gpu", "unit": "tok/s"}) == value(
        {**record, "metric": "output_throughput", "unit": "tok/s/GPU"})


def test_who_says_nothing_overlaps_batches_across_nodes_alone() -> None:
    record = {"model": "deepseek-v3", "phase": "decode"}
    assert stated({**record, "gpu": "H100"}, "decode", 32).tbo
    assert not stated({**record, "gpu": "GB200 NVL72"}, "decode", 32).tbo
    assert not stated({**record, "gpu": "H100", "backend": "TensorRT-LLM"}, "decode", 32).tbo


def test_a_narrow_latent_cache_is_no_slower_than_a_wide_one() -> None:
    record = {"model": "deepseek-v3", "gpu": "H200", "ep": 16, "metric": "output_throughput", "unit": "tok/s/GPU", "isl": 4096,
              "batch_per_gpu": 64}
    assert value({**record, "precision": "FP8, FP8 KV cache"}) >= 0.99 * value({**record, "precision": "FP8"})


def test_more_ranks_do_not_slow_decode_down_whatever_their_number() -> None:
    """Slots that do not divide well over ranks (64, 128, 256) make no steps of their own."""
    rates = [value({**DECODE, "model": "deepseek-r1", "gpu": "H200", "ep": ep}) for ep in (32, 64, 96, 128, 144, 256)]
    assert max(rates) / min(rates) < 1.15
    assert [redundant_slots(256, ep, 32) for ep in (64, 128, 256)] == [64, 128, 256]


def test_ranks_wait_at_barriers_for_a_tenth_of_a_layer_of_prompts() -> None:
    traced = {**PREFILL, "model": "deepseek-v3", "gpu": "H100", "ep": 32, "unit": "ms/layer", "id": "perfect_eplb"}

    def part(name: str, tbo: bool) -> float:
        return value({**traced, "metric": f"prefill_layer_time_{name}", "features": {"TBO": tbo, "EPLB": True}})

    for tbo in (True, False):
        waited = part("dispatch_barrier", tbo) + part("combine_barrier", tbo)
        assert 0.05 < waited / part("overall", tbo) < 0.15


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"ep": float("inf")}, "misstates ep"), ({"isl": 10**400}, "misstates isl"), ({"gpus": -1}, "misstates gpus"),
        ({"dp": "8x400Gb", "network": "0x0Gb"}, "lacks or misstates"), ({"model": "9" * 400}, "no preset"),
        ({"metric": "ttft", "isl": 1024, "osl": 64, "concurrency": 4, "prefill": {}, "decode": 1.0}, "lacks or misstates"),
        ({"model": "qwen3-8b", "metric": "balancedness_mean_over_max"}, "no experts"),
        ({"value": 10**400}, ""),
    ],
)  # fmt: skip
def test_a_record_of_wrong_types_does_not_end_the_others(changed: dict[str, Any], word: str) -> None:
    record = {"id": "a", "model": "deepseek-v3/r1", "gpu": "H200", "phase": "decode", "ep": 16, "isl": 2000, "batch_per_gpu": 64,
              "metric": "output_throughput", "unit": "tok/s/GPU", "value": 1.0}  # fmt: skip
    for one in ({**record, **changed}, record):
        found = _judge(one, 0)
        assert json.dumps(found.plain(), allow_nan=False) and found.line()
        if one is record or not word:
            assert found.found is not None and found.found.low <= found.found.value <= found.found.high
        else:
            assert found.found is None and word in found.reason
