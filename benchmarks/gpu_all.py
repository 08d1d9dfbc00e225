"""Everything that a GPU machine has to measure, in order of value, by one command that can be cut short and run again.

    python -m benchmarks.gpu_all --out run/gpu --budget 1500
    python -m benchmarks.gpu_all --out run/gpu --budget 600 --only serve --only azure
    python -m benchmarks.gpu_all --out run/gpu --list

Every job is a command of this repository in a process of its own; it leaves `NAME.json` (raw figures with provenance) and
`NAME.log` in the output folder, and `jobs.json` says of each how it ended. A job that has ended well is not run again; one
that was cut short or failed is. A job begins only if the time left is what it needs at least, and is ended when the budget is.
`summary.json` holds the figures that have targets.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from twin.spec.rundir import write_text

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
QWEN = ("--model", "qwen3-30b-a3b")
POINTS = ROOT / "benchmarks" / "results" / "h200-eptwin.points.json"


@dataclass(frozen=True)
class Job:
    """`command` after the Python interpreter; `{out}` is the output folder, `{budget}` the seconds that the job may take. It
    begins only with `least_s` left, and is ended after `most_s`. `again`: a later call goes on where it stopped."""

    name: str
    command: tuple[str, ...]
    least_s: float
    most_s: float
    env: tuple[tuple[str, str], ...] = ()
    again: bool = False


def _step(name: str, *more: str, least_s: float = 60, most_s: float = 240) -> Job:
    return Job(name, ("-m", "benchmarks.step", *more, "--json", f"{{out}}/{name}.json"), least_s, most_s)


def _serve(name: str, *more: str, env: tuple[tuple[str, str], ...] = ()) -> Job:
    return Job(name, ("-m", "benchmarks.serve", *QWEN, *more, "--json", f"{{out}}/{name}.json"), 100, 300, env)


def _slice(name: str, model: str, ep: int, redundant: int, *points: str) -> Job:
    where = ("--ep", str(ep), "--redundant", str(redundant), "--rank-slice", "--precision", "fp8")
    return _step(name, "--model", model, *where, *(points or ("--batch", "128", "--context", "4096")), least_s=60)


def _tests(name: str, *paths: str, least_s: float, most_s: float) -> Job:
    return Job(name, ("-m", "pytest", "-m", "gpu", *paths, "-rs", "-s", f"--junitxml={{out}}/{name}.xml"), least_s, most_s)


JOBS = (
    _tests("few_rows", "tests/runtime/kernels/test_few_rows.py", "tests/runtime/kernels/test_tune.py", least_s=40, most_s=180),
    _step("step", *QWEN, "--batch", "1", "--batch", "64", "--batch", "256", "--context", "1024", "--variants"),
    _serve("serve", "--requests", "128", "--max-batch-tokens", "16384"),
    _step("prefill", *QWEN, "--phase", "prefill", "--batch", "4", "--context", "4096", "--replays", "10"),
    _serve("azure", "--requests", "512", "--lengths", "azure-conv", "--max-num-seqs", "256", "--max-batch-tokens", "16384"),
    _slice("r1_ep32", "deepseek-r1", 32, 32),
    _slice("r1_ep72", "deepseek-r1", 72, 32),
    _slice("r1_ep144", "deepseek-r1", 144, 32),
    _slice("kimi_k2_ep32", "kimi-k2", 32, 0),
    _step("qwen_points", *QWEN, "--batch", "24", "--batch", "96", "--batch", "200", "--context", "600", "--context", "3000"),
    _slice("r1_points", "deepseek-r1", 32, 32, "--batch", "48", "--batch", "200", "--context", "1500"),
    _slice("kimi_points", "kimi-k2", 64, 0, "--batch", "48", "--batch", "160", "--context", "2500"),
    _step("qwen_prefill_points", *QWEN, "--phase", "prefill", "--batch", "1", "--batch", "6", "--context", "1800",
          "--replays", "10"),
    _step("qwen_235b_ep8", "--model", "qwen3-235b-a22b", "--ep", "8", "--rank-slice", "--batch", "64", "--context", "2000"),
    Job("profile", ("-m", "runtime.gpu_operators", "{out}/profile.json", "--budget", "{budget}"), 60, 240, again=True),
    _tests("agreement", "tests/runtime/test_agreement.py", least_s=120, most_s=420),
    Job("operators", ("benchmarks/operators.py", "--suite", "--json", "{out}/operators.json"), 60, 200),
    Job("mla_splits", ("-m", "benchmarks.mla_splits", "--json", "{out}/mla_splits.json"), 40, 120),
    Job("fp8_products", ("-m", "benchmarks.fp8_products", "--json", "{out}/fp8_products.json"), 60, 150),
    Job("calibrate", ("-m", "twin.cli", "calibrate", "qwen3_30b_one_gpu", "--device", "cuda", "--budget", "60", "--out",
                      "{out}/calibrate"), 100, 240),
    Job("exchange", ("-m", "benchmarks.exchange", "--share-gpu", "--ranks", "8", "--tokens", "128", "--json",
                     "{out}/exchange.json"), 60, 240),
    Job("prompts", ("-m", "benchmarks.prompts", "--json", "{out}/prompts.json"), 40, 90),
    Job("shapes", ("-m", "benchmarks.shapes", "{out}/shapes", "--budget", "{budget}"), 100, 900, again=True),
    Job("ep_decode", ("-m", "benchmarks.ep_decode", "--share-gpu", "--ranks", "8", "--tp", "2", "--tbo", "--budget",
                      "{budget}", "--json", "{out}/ep_decode.json"), 90, 240),
    _step("small_batches", *QWEN, "--batch", "2", "--batch", "4", "--batch", "8", "--batch", "16", "--variants"),
    _tests("kernels", "tests/runtime/kernels", least_s=120, most_s=400),
    _serve("serve_expandable", "--requests", "128", "--max-batch-tokens", "16384", "--no-tune",
           env=(("PYTORCH_ALLOC_CONF", "expandable_segments:True"),)),
    _serve("serve_cold", "--requests", "128", "--max-batch-tokens", "16384", "--no-warm-up", "--no-tune"),
)


class Book:
    """`jobs.json`: how each job ended."""

    def __init__(self, out: Path) -> None:
        self.path = out / "jobs.json"
        self.jobs: dict[str, Json] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def ended_well(self, job: Job) -> bool:
        return not job.again and self.jobs.get(job.name, {}).get("ended") == "well"

    def note(self, job: Job, ended: str, seconds: float) -> None:
        self.jobs[job.name] = {"ended": ended, "seconds": round(seconds, 1), "command": list(job.command)}
        write_text(self.path, json.dumps(self.jobs, indent=1) + "\n")


def run_all(jobs: Sequence[Job], out: Path, budget_s: float, clock: Callable[[], float] = time.monotonic,
            say: Callable[[str], None] = click.echo) -> Book:
    """Run what has not ended well, in order, while the budget lasts."""
    out.mkdir(parents=True, exist_ok=True)
    book, until = Book(out), clock() + budget_s
    for job in jobs:
        left = until - clock()
        if book.ended_well(job):
            say(f"{job.name:18} done before")
        elif left < job.least_s:
            say(f"{job.name:18} left out: {left:.0f} s left, {job.least_s:.0f} needed")
        else:
            began = clock()
            ended = run_job(job, out, min(left, job.most_s))
            book.note(job, ended, clock() - began)
            say(f"{job.name:18} ended {ended} after {clock() - began:.0f} s")
            write_text(out / "summary.json", json.dumps(summary(out), indent=1) + "\n")
    return book


def run_job(job: Job, out: Path, limit_s: float) -> str:
    """well, badly (with its status), or cut short; the job's whole process group is gone afterwards."""
    argv = [sys.executable, *(part.replace("{out}", str(out.resolve())).replace("{budget}", str(max(10, int(limit_s - 20))))
                              for part in job.command)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
           **dict(job.env)}
    with (out / f"{job.name}.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return "cut short"
        finally:
            _end(process)
    return "well" if status == 0 else f"badly ({status})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the job's own process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(out: Path) -> Json:
    """The figures that have targets, of the files that are there."""
    found: Json = {}

    def read(name: str) -> Json | None:
        path = out / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    for name in [job.name for job in JOBS if "benchmarks.step" in job.command]:
        for row in (read(name) or {"rows": []})["rows"]:
            both = {k: v for k, v in row.get("variants", {}).items() if k != "parts"}
            key = f"{name} batch {row['batch']} context {row['context']}"
            found[key] = {k: row[k] for k in ("step_s", "tokens_per_s", "roofline_share")} | both
    for name in ("serve", "serve_expandable", "serve_cold", "azure"):
        if (served := read(name)) is not None:
            keys = ("output_tokens_per_s", "wall_s", "ready_s", "prefill_steps_s", "compiles_after_start", "device_allocs")
            found[name] = {k: served["figures"][k] for k in keys}
    for name in ("few_rows", "kernels", "agreement"):
        if (path := out / f"{name}.xml").exists():
            suite = ElementTree.parse(path).getroot().find("testsuite")
            if suite is not None:
                found[name] = {k: int(suite.get(k, "0")) for k in ("tests", "failures", "errors", "skipped")}
    found |= implied(read("azure"), read("step"), read("prefill"))
    return found


def implied(azure: Json | None, step: Json | None, prefill: Json | None) -> Json:
    """What serving should take if prompts were read at the prefill benchmark's rate and outputs made at the largest decode
    batch's, one after the other; and its share of what it took."""
    if azure is None or step is None or prefill is None or not step["rows"] or not prefill["rows"]:
        return {}
    figures = azure["figures"]
    decode = max(step["rows"], key=lambda row: row["batch"])["tokens_per_s"]
    seconds = figures["prompt_tokens"] / prefill["rows"][0]["tokens_per_s"] + figures["output_tokens"] / decode
    return {"azure against steady state": {"implied_s": seconds, "share": seconds / figures["wall_s"]}}


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "run" / "gpu", show_default="run/gpu")
@click.option("--budget", "budget_s", type=float, default=1500.0, show_default=True, help="Seconds for all jobs.")
@click.option("--only", multiple=True, type=click.Choice([job.name for job in JOBS]), help="May be repeated.")
@click.option("--again", multiple=True, type=click.Choice([job.name for job in JOBS]), help="Run though it ended well before.")
@click.option("--list", "listed", is_flag=True, help="Name the jobs and run nothing.")
def main(out: Path, budget_s: float, only: tuple[str, ...], again: tuple[str, ...], listed: bool) -> None:
    jobs = [job for job in JOBS if not only or job.name in only]
    if listed:
        for job in jobs:
            click.echo(f"{job.name:18} {job.least_s:4.0f} .. {job.most_s:4.0f} s  {' '.join(job.command)}")
        return
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException("this needs a CUDA GPU; --list names the jobs")
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "profile.points.json"
    if "H200" in torch.cuda.get_device_name(0) and not kept.exists():
        shutil.copy(POINTS, kept)  # the profile's points so far, which this kind of machine measured
    book = Book(out)
    for name in again:
        book.jobs.pop(name, None)
    write_text(book.path, json.dumps(book.jobs, indent=1) + "\n")
    run_all(jobs, out, budget_s)
    click.echo((out / "summary.json").read_text(encoding="utf-8") if (out / "summary.json").exists() else "nothing was run")


if __name__ == "__main__":
    main()
