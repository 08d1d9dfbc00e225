"""`eptwin validate step`: one rank's step beside what the step benchmark measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import twin.commands.step as command
from twin.cli import cli
from twin.cost.evidence import Evidence
from twin.spec.errors import SpecError
from twin.spec.load import load_model
from twin.spec.scenario import Routing
from twin.validate.step import PHASES, Case, Pair, phase_seconds, predict, read_measured, summary, too_large

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
QWEN = load_model("qwen3-30b-a3b")
ASK = ["validate", "step", "--model", "qwen3-30b-a3b", "--batch", "16", "--context", "512"]


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence.load()


@pytest.fixture(scope="module")
def pairs(evidence: Evidence) -> list[Pair]:
    files = sorted(RESULTS.glob("h200_step_*.json"))
    assert len(files) == 4, "decode, prefill, small batches, and points that nobody looked at before"
    return [Pair(case, predict(case, evidence), row) for file in files for case, row in read_measured(file)]


def test_our_own_steps_on_an_h200_are_predicted(pairs: list[Pair]) -> None:
    found = summary(pairs)
    assert found["pairs"] == 14
    assert found["median_abs_error"] < 0.03 and found["p95_abs_error"] < 0.08
    assert found["inside_80"] >= 0.8


def test_phases_are_the_benchmarks_and_hold_the_whole_step(pairs: list[Pair]) -> None:
    known = {name for name, _ in PHASES} | {"engine/slowdown"}  # what fused kernels save of few rows
    for pair in pairs:
        assert sum(a for _, a, _ in pair.phases()) == pytest.approx(pair.predicted.total_s, rel=1e-9)
        assert {name for name, _, _ in pair.phases()} <= known
        assert pair.measured is not None and {n for n, _, b in pair.phases() if b is not None} == set(pair.measured["parts_s"])
    assert phase_seconds({"moe/shared": 1.0, "moe/dispatch/copy": 2.0, "host/overhead": 3.0}) == {
        "shared_experts": 1.0, "dispatch": 2.0, "host/overhead": 3.0}


def test_a_rank_alone_copies_and_an_instance_exchanges(evidence: Evidence) -> None:
    case = {"model": load_model("deepseek-r1"), "phase": "decode", "batch": 64, "context": 2000, "ep": 32, "precision": "fp8"}
    alone, whole = (predict(Case(**case, instance=instance), evidence) for instance in (False, True))
    assert {"moe/dispatch/copy", "moe/combine/copy"} <= set(alone.parts_s)
    assert not any(key.startswith("host/") or key.endswith(("rdma", "nvlink", "wait")) for key in alone.parts_s)
    assert {"moe/dispatch/rdma", "host/overhead"} <= set(whole.parts_s) and "moe/dispatch/copy" not in whole.parts_s
    assert whole.parts_s["moe/experts"] + whole.parts_s.get("moe/permute", 0.0) > 0
    assert not Case(**{**case, "tp": 2}).alone, "TP ranks need each other"


def test_what_no_gpu_can_hold_is_told() -> None:
    asked = {"phase": "decode", "batch": 64, "context": 2048}
    assert too_large(Case(QWEN, **asked)) is None
    assert too_large(Case(QWEN, **{**asked, "context": 400_000})) is not None
    assert too_large(Case(load_model("deepseek-r1"), **asked)) is not None  # its weights
    shown = CliRunner().invoke(cli, ["validate", "step", "--model", "deepseek-r1", "--batch", "1", "--context", "9"])
    assert shown.exit_code == 0 and "does not fit a h200" in shown.stderr and "predicted" in shown.stdout


def test_a_layer_less_is_a_layer_less(evidence: Evidence, tmp_path: Path) -> None:
    data = json.loads((RESULTS / "h200_step_qwen3_30b_decode.json").read_text())
    path = tmp_path / "short.json"
    path.write_text(json.dumps({**data, "layers": 12, "skew": 0.5}))
    case, _ = read_measured(path)[0]
    assert case.model.layers == 12 and case.routing == Routing(kind="lognormal", sigma=0.5) and case.gpu == "h200"
    whole = predict(read_measured(RESULTS / "h200_step_qwen3_30b_decode.json")[0][0], evidence)
    assert predict(case, evidence).parts_s["moe/experts"] == pytest.approx(whole.parts_s["moe/experts"] / 4, rel=0.01)


def prompts_file(path: Path, **row: Any) -> Path:
    """A result of a prompt of 100 tokens, with what a row tells of its graph."""
    data = json.loads((RESULTS / "h200_step_qwen3_30b_prefill.json").read_text())
    rows = [{**data["rows"][0], "batch": 1, "context": 100, **row}]
    path.write_text(json.dumps({**data, "rows": rows}))
    return path


def test_a_prediction_follows_how_a_row_ran(evidence: Evidence, tmp_path: Path) -> None:
    """Files from before prompts ran from graphs say nothing of them; without a file it is as the engine does now."""
    path = tmp_path / "f.json"

    def predicted(**row: Any) -> tuple[Case, float]:
        case, _ = read_measured(prompts_file(path, **row))[0]
        return case, predict(case, evidence).total_s

    before, eager_s = predicted()
    assert before.graph_tokens == 0 and predict(before, evidence).parts_s["host/launch"] > 0
    assert predicted(graph_tokens=0)[1] == predicted(graph_tokens=None)[1] == eager_s
    graph, graph_s = predicted(graph_tokens=112)
    habit = Case(graph.model, "prefill", batch=1, context=100)
    assert graph.graph_tokens == 112 and "host/launch" not in predict(graph, evidence).parts_s
    assert predict(habit, evidence).total_s == graph_s < eager_s, "100 tokens run as 112, whatever else fits the pool"
    wide, wide_s = predicted(graph_tokens=100)
    assert wide.graph_tokens == 100 and wide_s < graph_s, "a graph of just these tokens pads nothing"
    assert graph.named().endswith("graph 112") and before.named().endswith("no graph")
    with pytest.raises(SpecError):
        predicted(graph_tokens=-1)
    decode, _ = read_measured(RESULTS / "h200_step_qwen3_30b_decode.json")[0]
    assert decode.graph_tokens is None


def test_longer_prompts_than_graphs_are_predicted_alike(evidence: Evidence) -> None:
    case = {"model": QWEN, "phase": "prefill", "batch": 2, "context": 4096}
    assert predict(Case(**case), evidence) == predict(Case(**case, graph_tokens=0), evidence)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "qwen3-30b-a3b", "layers": 48, "rows": 3}', "nul",
                                  '{"model": "qwen3-30b-a3b", "layers": 48, "ep": 1, "redundant": 0, "precision": "bf16", '
                                  '"provenance": {"gpu": "NVIDIA H200"}, "rows": [{"phase": "decode", "batch": 1, "context": 9, '
                                  '"step_s": NaN}]}'])
def test_files_that_are_no_result_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(SpecError):
        read_measured(path)


def test_without_a_gpu_the_prediction_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_gpu_here", lambda: None)
    shown = CliRunner().invoke(cli, ASK)
    assert shown.exit_code == 0 and "no NVIDIA GPU" in shown.stderr
    assert "predicted" in shown.stdout and "measured " not in shown.stdout.splitlines()[0]
    document = json.loads(CliRunner().invoke(cli, [*ASK, "--json"]).stdout)
    pair = document["pairs"][0]
    assert pair["measured"] is None and pair["predicted"]["low_s"] < pair["predicted"]["step_s"] < pair["predicted"]["high_s"]
    assert set(pair["predicted"]["sources"]) == set(pair["predicted"]["parts_s"]) and "no NVIDIA GPU" in document["note"]


def test_where_the_gpu_is_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def bench(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(arguments)
        row = {"phase": "decode", "batch": 16, "context": 512, "step_s": 9e-3, "p10_s": 9e-3, "p90_s": 9e-3, "parts_s": {}}
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps({
            "model": "qwen3-30b-a3b", "layers": 48, "ep": 1, "redundant": 0, "precision": "bf16", "skew": 0.0,
            "provenance": {"gpu": "NVIDIA H200"}, "rows": [row]}))
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(command, "_gpu_here", lambda: "NVIDIA H200")
    monkeypatch.setattr(command.subprocess, "run", bench)
    shown = CliRunner().invoke(cli, ASK)
    assert shown.exit_code == 0 and "measured 9.000 ms" in shown.stdout and "NVIDIA H200" in shown.stderr
    assert ran[0][1:3] == ["-m", "benchmarks.step"] and "--rank-slice" not in ran[0]
    other = CliRunner().invoke(cli, [*ASK, "--gpu", "h100"])
    assert other.exit_code == 0 and "the GPU here is NVIDIA H200" in other.stderr and len(ran) == 1
    CliRunner().invoke(cli, [*ASK, "--ep", "8"])
    assert "--rank-slice" in ran[1]


@pytest.mark.parametrize("graph_tokens", [0, 112])
def test_what_ran_here_is_predicted_as_it_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, graph_tokens: int) -> None:
    def bench(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        prompts_file(Path(arguments[arguments.index("--json") + 1]), graph_tokens=graph_tokens)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(command, "_gpu_here", lambda: "NVIDIA H200")
    monkeypatch.setattr(command.subprocess, "run", bench)
    ask = ["validate", "step", "--model", "qwen3-30b-a3b", "--batch", "1", "--context", "100", "--phase", "prefill", "--json"]
    pair = json.loads(CliRunner().invoke(cli, ask).stdout)["pairs"][0]
    assert pair["graph_tokens"] == graph_tokens and ("host/launch" in pair["predicted"]["parts_s"]) == (graph_tokens == 0)


def test_the_command_reads_files_and_filters_rows() -> None:
    file = str(RESULTS / "h200_step_qwen3_30b_decode.json")
    shown = CliRunner().invoke(cli, ["validate", "step", "--against", file])
    assert shown.exit_code == 0 and "3 pairs: error median" in shown.stdout and "experts" in shown.stdout
    one = json.loads(CliRunner().invoke(cli, ["validate", "step", "--against", file, "--batch", "64", "--json"]).stdout)
    assert [pair["batch"] for pair in one["pairs"]] == [64] and abs(one["pairs"][0]["error"]) < 0.05
    assert isinstance(CliRunner().invoke(cli, ["validate", "step", "--against", file, "--batch", "5"]).exception, SpecError)
    assert CliRunner().invoke(cli, ["validate", "step"]).exit_code == 2
    assert CliRunner().invoke(cli, [*ASK, "--routing", "zipf:much"]).exit_code == 2


def test_a_prediction_never_imports_torch() -> None:
    code = ("import sys; from twin.cli import cli; "
            f"cli.main({ASK!r} + ['--no-run'], standalone_mode=False); assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
