"""Exit codes, pure JSON on stdout, and the words a person sees."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from twin.cli import _code
from twin.spec.results import RunResult, SearchResult

ROOT = Path(__file__).resolve().parents[2]
FAST = [
    "--set",
    "search.tp=[1]",
    "--set",
    "search.dp=[8,16]",
    "--set",
    "search.max_num_seqs=[64]",
    "--set",
    "search.max_batch_tokens=[8192]",
    "--set",
    "search.redundant_experts=[0]",
    "--set",
    "search.simulate_top=2",
    "--set",
    "workload.requests=60",
    "--workers",
    "0",
    "--requests",
    "60",
]


def process(*arguments):
    """The command as a person starts it."""
    return subprocess.run(
        [sys.executable, "-m", "twin.cli", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=110, check=False
    )


def eptwin(*arguments):
    """The command without a process of its own, whose imports take longer than most commands."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _code(list(arguments))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_plan_prints_one_json_document():
    done = process("plan", "r1_chat", "--json", *FAST)
    assert done.returncode == 0, done.stderr
    found = SearchResult.model_validate_json(done.stdout)
    assert found.best is not None and found.best.feasible and found.candidates[0] == found.best
    assert found.considered >= 4 and "considered" in done.stderr


def test_no_plan_fits_says_what_binds():
    done = process("plan", "r1_chat", "--set", "workload.slo.tpot_s=1 ms", *FAST)
    assert done.returncode == 1 and done.stdout == ""
    assert "TPOT" in done.stderr and "error:" in done.stderr and "Traceback" not in done.stderr


def test_memory_that_does_not_fit_says_by_how_much():
    done = eptwin("plan", "r1_chat", "--set", "cluster=h100-1x8", *FAST)
    assert done.returncode == 1
    assert "GiB" in done.stderr and "Traceback" not in done.stderr


def test_simulate_writes_a_run_directory(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"pools": [{"role": "mixed", "dp": 32, "ep": 32}]}')
    out = tmp_path / "run"
    done = eptwin("simulate", "r1_chat", "--plan", str(plan), "--set", "workload.requests=40", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = RunResult.model_validate_json(done.stdout)
    assert result.counts.submitted == 40
    assert {p.name for p in out.iterdir()} == {
        "scenario.yaml",
        "plan.json",
        "results.json",
        "requests.jsonl",
        "trace.json",
        "report.html",
    }
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    page = (out / "report.html").read_bytes()
    again = eptwin("report", str(out), "--csv", str(tmp_path / "tables"))
    assert len((tmp_path / "tables" / "requests.csv").read_text().splitlines()) == 41
    assert again.returncode == 0 and (out / "report.html").read_bytes() == page
    assert again.stdout.strip() == str(out / "report.html")
    for kind, word in (
        ("vllm", "--data-parallel-size 32"),
        ("sglang", "--ep-size 32"),
        ("lws", "LeaderWorkerSet"),
        ("dynamo", "nvidia.com/v1beta1"),
        ("pai", "EP_SIZE"),
    ):
        exported = eptwin("export", str(out), "--format", kind)
        assert exported.returncode == 0 and word in exported.stdout, exported.stderr


def test_simulate_begins_in_the_steady_state_of_an_open_loop(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"pools": [{"role": "prefill", "dp": 8, "tp": 2, "ep": 16}, {"role": "decode", "dp": 16, "ep": 16}]}')
    done = eptwin("simulate", "r1_chat", "--plan", str(plan), "--json", "--set", "workload.arrivals.rate_per_s=30")
    found = RunResult.model_validate_json(done.stdout)
    assert found.steady.verdict == "steady", found.steady.reason  # in an empty service the requests seem to pile up
    assert found.throughput.requests_per_s > 0.9 * 30


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["plan", "no_such_scenario"], 2, "no scenario"),
        (["plan", "r1_chatt"], 2, "did you mean 'r1_chat'"),
        (["plann"], 2, "plan"),
        (["plan"], 2, "Missing argument"),
        (["simulate", "r1_chat"], 2, "states no plan"),
        (["report", "/nonexistent"], 2, "run directory"),
        (["presets", "models"], 0, ""),
        (["presets"], 0, ""),
        (["schema", "plan"], 0, ""),
        (["import", "model", "deepseek-r1"], 0, ""),
        (["--version"], 0, ""),
    ],
)  # fmt: skip
def test_exit_codes(arguments, code, word):
    done = eptwin(*arguments)
    assert done.returncode == code, done.stderr
    assert word in done.stderr and "Traceback" not in done.stderr


def test_presets_without_a_kind_are_all_named():
    whole = json.loads(eptwin("presets", "--json").stdout)
    assert "deepseek-r1" in whole["models"] and {"mi355x", "ascend-910c"} <= set(whole["gpus"])
    told = eptwin("presets").stdout
    assert all(name in told for names in whole.values() for name in names)


def test_head_is_quiet():
    command = f"{sys.executable} -m twin.cli schema results | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.startswith("{") and done.stderr == ""


def test_options_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("EPTWIN_PRESETS_AS_JSON", "1")
    done = eptwin("presets", "models")
    assert "deepseek-r1" in json.loads(done.stdout)


TOPO = """\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tPIX\t0-47
GPU1\tNV18\t X \tNODE\t0-47
NIC0\tPIX\tNODE\t X \t
"""


def test_import_topo(tmp_path):
    saved = tmp_path / "node.txt"
    saved.write_text(TOPO)
    out = tmp_path / "cluster.yaml"
    done = eptwin("import", "topo", str(saved), "--nodes", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    from twin.spec.load import load_cluster

    cluster = load_cluster(out)
    assert (cluster.gpus, cluster.network.nics_per_node, cluster.network.nvlink_domain_gpus) == (6, 1, 2)
    saved.write_text(TOPO.replace("NODE", "????"))
    assert eptwin("import", "topo", str(saved)).returncode == 2
