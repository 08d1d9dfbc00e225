"""Rows of serving benchmarks as questions: small files in the same columns, made here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from twin.spec.errors import SpecError
from twin.validate.rows import Question, Unanswered, in_fit_half, question_of, read_rows

_LAYOUT = ["tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"]
HEADER = ["id", "silicon_data_source", "backend", "backend_version", "model_path", "system", "precision", "mode", "isl", "osl",
          "gemm_quant_mode", "moe_quant_mode", "batch_size", *_LAYOUT,
          *(f"{role}_{name}" for role in ("prefill", "decode") for name in ("batch_size", "num_workers", *_LAYOUT)),
          "silicon_ttft_ms", "silicon_tpot_ms", "rival_ttft_ms", "rival_tpot_ms"]
AGG = {"id": "a", "backend": "vllm", "model_path": "MiniMaxAI/MiniMax-M2.5", "system": "h200_sxm", "precision": "fp8",
       "mode": "agg", "isl": "1024", "osl": "1024", "gemm_quant_mode": "fp8", "moe_quant_mode": "fp8", "batch_size": "8.0",
       "tp_size": "4.0", "pp_size": "1.0", "attention_dp_size": "1.0", "moe_tp_size": "4.0", "moe_ep_size": "1.0",
       "silicon_ttft_ms": "150", "silicon_tpot_ms": "12"}
DISAGG = {"id": "d", "backend": "trtllm", "model_path": "deepseek-ai/DeepSeek-R1", "system": "b200_sxm", "precision": "fp4",
          "mode": "disagg", "isl": "8192", "osl": "1024", "gemm_quant_mode": "nvfp4", "moe_quant_mode": "nvfp4",
          "prefill_num_workers": "1", "prefill_tp_size": "1", "prefill_attention_dp_size": "4", "prefill_moe_tp_size": "1",
          "prefill_moe_ep_size": "4", "decode_batch_size": "5", "decode_num_workers": "2", "decode_tp_size": "8",
          "decode_attention_dp_size": "1", "decode_moe_tp_size": "1", "decode_moe_ep_size": "8"}


def write(path: Path, *rows: dict[str, str]) -> Path:
    lines = [",".join(HEADER), *(",".join(row.get(name, "") for name in HEADER) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ask(tmp_path: Path, **changes: str) -> Question | Unanswered:
    return question_of(read_rows(write(tmp_path / "rows.csv", {**AGG, **changes}))[0], tmp_path)


def test_a_row_becomes_a_deployment_and_its_traffic(tmp_path: Path) -> None:
    q = ask(tmp_path)
    assert isinstance(q, Question)
    pool = q.plan.pools[0]
    assert (q.model.name, pool.role, pool.tp, pool.dp, pool.ep, q.concurrency) == ("minimax-m2.5", "mixed", 4, 1, 1, 8)
    assert (q.plan.precision.weights, q.plan.precision.experts) == ("fp8_block", "fp8_block")
    assert q.workload.isl is not None and (q.workload.isl.low, q.workload.isl.high) == (819, 1024)
    assert (q.measured_ttft_s, q.measured_tpot_s) == (0.15, 0.012)


def test_separated_rows_have_two_pools_and_count_users_of_all_decode_workers(tmp_path: Path) -> None:
    q = ask(tmp_path, **DISAGG)
    assert isinstance(q, Question)
    prefill, decode = q.plan.pools
    assert (prefill.role, prefill.dp, prefill.ep, decode.role, decode.tp, decode.instances) == ("prefill", 4, 4, "decode", 8, 2)
    assert q.concurrency == 10 and q.plan.precision.experts == "fp4" and q.plan.precision.weights == "bf16"
    assert q.cluster.gpus >= prefill.gpus + decode.gpus


@pytest.mark.parametrize(("changes", "says"), [
    ({"tp_size": "16", "moe_tp_size": "4", "moe_ep_size": "4"}, "mistake of the collection"),
    ({"backend": "lmdeploy"}, "engine"), ({"system": "tpu_v7"}, "system"), ({"model_path": "who/knows"}, "no preset"),
    ({"attention_dp_size": "1000000"}, "beyond"), ({"model_path": "x" * 400}, "no preset"),
    ({"pp_size": "2", "tp_size": "2"}, "pipeline"), ({"moe_quant_mode": "int3"}, "format"), ({"mode": "both"}, "mode")])
def test_a_row_that_cannot_be_answered_says_why(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    found = ask(tmp_path, **changes)
    assert isinstance(found, Unanswered) and says in found.reason
    assert found.mistake is (says == "mistake of the collection")


@pytest.mark.parametrize(("path", "preset"), [
    ("nvidia/DeepSeek-R1-NVFP4", "deepseek-r1"), ("deepseek-ai/DeepSeek-V3.1", "deepseek-v3"),
    ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b"), ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
    ("nvidia/Qwen3-32B-NVFP4", "qwen3-32b"), ("moonshotai/Kimi-K2-Thinking", "kimi-k2")])
def test_names_of_quantised_and_later_releases_find_their_shape(tmp_path: Path, path: str, preset: str) -> None:
    q = ask(tmp_path, model_path=path, tp_size="1", moe_tp_size="1")
    assert isinstance(q, Question) and q.model.name == preset


def test_blank_fields_take_what_the_rest_implies(tmp_path: Path) -> None:
    blank = ask(tmp_path, attention_dp_size="", tp_size="2", moe_tp_size="1", moe_ep_size="8", precision="", gemm_quant_mode="",
                moe_quant_mode="", pp_size="")
    assert isinstance(blank, Question)
    assert (blank.plan.pools[0].dp, blank.plan.pools[0].ep) == (4, 8)
    assert blank.plan.precision.experts == "fp8_block"  # as the checkpoint stores them


@pytest.mark.parametrize(("column", "value"), [("isl", "-4"), ("isl", "many"), ("tp_size", "1.5"), ("osl", ""), ("osl", "NaN"),
                                               ("batch_size", "1e99"), ("moe_ep_size", "0")])
def test_a_cell_that_cannot_be_read_is_its_rows_problem_alone(tmp_path: Path, column: str, value: str) -> None:
    bad, good = read_rows(write(tmp_path / "bad.csv", {**AGG, column: value}, AGG))
    answer = question_of(bad)
    assert isinstance(answer, Unanswered) and column in answer.reason
    assert isinstance(question_of(good), Question)


@pytest.mark.parametrize(("path", "experts"), [
    ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "fp8_block"), ("Qwen/Qwen3-235B-A22B", "bf16"), ("openai/gpt-oss-120b", "mxfp4"),
    ("nvidia/Qwen3-235B-A22B-NVFP4", "fp4"), ("deepseek-ai/DeepSeek-V3", "fp8_block")])
def test_a_format_that_no_column_tells_is_the_checkpoints(tmp_path: Path, path: str, experts: str) -> None:
    q = ask(tmp_path, model_path=path, precision="", gemm_quant_mode="", moe_quant_mode="")
    assert isinstance(q, Question) and q.plan.precision.experts == experts


@pytest.mark.parametrize("value", ["", "nan", "-1", "soon"])
def test_a_row_without_a_measurement_is_still_a_question(tmp_path: Path, value: str) -> None:
    q = ask(tmp_path, silicon_tpot_ms=value)
    assert isinstance(q, Question) and math.isnan(q.measured_tpot_s) and q.measured_ttft_s == 0.15


@pytest.mark.parametrize(("engine", "system", "means"), [
    ("vLLM", "H200", ("vllm", "h200_sxm")), ("dynamo-trt", "b200", ("trtllm", "b200_sxm")),
    ("TensorRT-LLM", "GB200", ("trtllm", "gb200")), ("dynamo-sglang", "b300-sxm", ("sglang", "b300_sxm")),
    ("sglang", "GB200_NVL72", ("sglang", "gb200")), ("vllm", "h100-sxm5", ("vllm", "h100_sxm"))])
def test_engines_and_systems_under_other_names(tmp_path: Path, engine: str, system: str, means: tuple[str, str]) -> None:
    q = ask(tmp_path, backend=engine, system=system)
    assert isinstance(q, Question) and (q.row.texts["backend"], q.row.texts["system"]) == means


def test_a_file_without_the_columns_or_with_ragged_lines_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.csv"
    short.write_text("id,isl\nx,4\n", encoding="utf-8")
    with pytest.raises(SpecError, match="lacks the columns"):
        read_rows(short)
    ragged = write(tmp_path / "ragged.csv", AGG)
    ragged.write_text(ragged.read_text(encoding="utf-8") + "a,b\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"ragged.csv:3.*2 cells"):
        read_rows(ragged)


def test_a_configuration_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "r.csv", *({**AGG, "batch_size": str(b), "isl": i, "model_path": m}
                                                for b in (4, 8) for i in ("1024", "8192") for m in ("deepseek-ai/DeepSeek-R1",
                                                                                                    "deepseek-ai/DeepSeek-V3"))))
    assert len({in_fit_half(row) for row in rows}) == 1  # same shape, same deployment: lengths and users do not matter
    assert len({in_fit_half(rows[0], seed) for seed in range(16)}) == 2
