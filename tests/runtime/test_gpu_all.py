"""The command that measures everything: order, budget, going on where it stopped; and that its jobs are commands that exist."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import gpu_all
from benchmarks.gpu_all import JOBS, Job, implied, run_all, summary

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


def job(name: str, out: Path, code: str = APPEND, least_s: float = 1, most_s: float = 30, **more: object) -> Job:
    return Job(name, ("-c", code, "{out}/order", name), least_s, most_s, **more)


def test_jobs_run_once_in_order_and_what_failed_runs_again(tmp_path: Path) -> None:
    jobs = [job("a", tmp_path), job("b", tmp_path, APPEND + "; sys.exit(3)"), job("c", tmp_path, again=True)]
    said: list[str] = []
    for _ in range(2):
        run_all(jobs, tmp_path, 60, say=said.append)
    assert (tmp_path / "order").read_text() == "abcbc"
    book = json.loads((tmp_path / "jobs.json").read_text())
    assert [book[name]["ended"] for name in "abc"] == ["well", "badly (3)", "well"]
    assert any("done before" in line for line in said)


def test_the_budget_is_kept(tmp_path: Path) -> None:
    sleeper = "import os, subprocess, sys, time; print('begun', os.environ['MARK']); subprocess.run([sys.executable, '-c', " \
              "'import time; time.sleep(60)'])"
    jobs = [job("long", tmp_path, sleeper, most_s=5, env=(("MARK", "here"),)), job("large", tmp_path, least_s=1000),
            job("small", tmp_path)]
    book = run_all(jobs, tmp_path, 60, say=lambda line: None)
    assert book.jobs["long"]["ended"] == "cut short" and "large" not in book.jobs
    assert "begun here" in (tmp_path / "long.log").read_text()
    assert (tmp_path / "order").read_text() == "small"


def arguments(command: tuple[str, ...]) -> tuple[str, list[str]]:
    """(module, its arguments)."""
    filled = [part.replace("{out}", "run/gpu").replace("{budget}", "60") for part in command]
    if filled[0] == "-m":
        return filled[1], filled[2:]
    return filled[0].removesuffix(".py").replace("/", "."), filled[1:]


@pytest.mark.parametrize("one", JOBS, ids=lambda one: one.name)
def test_every_job_is_a_command_that_exists(one: Job, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    module, rest = arguments(one.command)
    if module == "pytest":
        assert all((gpu_all.ROOT / part).exists() for part in rest if part.startswith("tests/"))
        return
    if module == "twin.cli":
        from twin.commands.run import calibrate as command

        rest = rest[1:]
    elif module == "runtime.gpu_operators":
        with pytest.raises(SystemExit):
            importlib.import_module(module).main([*rest, "--help"])
        assert "--budget" in capsys.readouterr().out
        return
    else:
        command = importlib.import_module(module).main
    context = command.make_context(module, list(rest))
    assert context.params and all(not isinstance(value, str) or "{" not in value for value in context.params.values())


def test_the_summary_reads_what_is_there(tmp_path: Path) -> None:
    assert summary(tmp_path) == {}
    rows = [{"batch": 256, "context": 1024, "step_s": 0.02, "tokens_per_s": 10_000.0, "roofline_share": 0.8,
             "variants": {"plain_s": 0.02, "fused_s": 0.03, "serves": "plain", "parts": [1]}}]
    (tmp_path / "step.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "prefill.json").write_text(json.dumps({"rows": [{**rows[0], "tokens_per_s": 50_000.0}]}))
    figures = dict.fromkeys(("output_tokens_per_s", "ready_s", "prefill_steps_s", "compiles_after_start", "device_allocs"), 1)
    azure = {"figures": {**figures, "wall_s": 10.0, "prompt_tokens": 200_000, "output_tokens": 40_000}}
    (tmp_path / "azure.json").write_text(json.dumps(azure))
    (tmp_path / "kernels.xml").write_text('<testsuites><testsuite tests="3" failures="1" errors="0" skipped="2"/></testsuites>')
    found = summary(tmp_path)
    assert found["azure against steady state"] == {"implied_s": 8.0, "share": 0.8}
    assert found["kernels"]["failures"] == 1 and found["step batch 256 context 1024"]["fused_s"] == 0.03
    assert "parts" not in found["step batch 256 context 1024"]
    assert implied(azure, None, None) == {}


def test_serving_fills_its_warm_up_and_draws_the_trace_s_lengths() -> None:
    import numpy as np

    from benchmarks.serve import azure_like, fill

    prompts = [[0] * 100] * 50
    assert sum(map(len, fill(prompts, 1000))) > 1250 and len(fill(prompts, 10**6)) == 50
    isl, osl = azure_like(np.random.default_rng(0), 20_000)
    assert abs(np.median(isl) - 1020) < 40 and abs(np.median(osl) - 129) < 6
    assert max(isl) <= 4142 and max(osl) <= 601 and min(osl) >= 1
