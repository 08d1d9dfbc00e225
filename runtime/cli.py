"""`eptwin serve` and `eptwin bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from runtime.bench import BenchOptions, stderr_progress
from runtime.bench import bench as run_bench
from runtime.frontend import Frontend
from runtime.gateway import GatewaySettings
from runtime.gateway import serve as run_gateway
from runtime.options import EngineOptions
from twin.spec.check import check_plan
from twin.spec.errors import EptwinError, SpecError
from twin.spec.load import load_model, load_plan, load_scenario, load_workload
from twin.spec.model import ModelSpec
from twin.spec.options import a_number, out_folder
from twin.spec.plan import Plan
from twin.spec.rundir import dump_json, write_run
from twin.spec.units import format_s
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the engine runs, the same for every command that starts one."""
    folder = click.Path(path_type=Path)
    for option in (
        click.option("--timeout", "timeout_s", type=click.FloatRange(0.1, 3600), default=3.0, show_default=True,
                     callback=a_number, help="Seconds without a sign of life after which a rank counts as lost."),
        click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="Arithmetic; default: fp32 on cpu, bf16 on cuda."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                     help="Where ranks compute."),
        click.option("--checkpoint", type=folder, help="Folder of safetensors; default: random weights of the model."),
    ):  # fmt: skip
        command = option(command)
    return command


def make_options(checkpoint: Path | None, device: str, dtype: str | None, timeout_s: float, **more: Any) -> EngineOptions:
    """Engine options from the command line's."""
    chosen = dtype or ("bf16" if device == "cuda" else "fp32")
    return EngineOptions(
        checkpoint=str(checkpoint) if checkpoint else None,
        device=device,
        dtype=chosen,
        timeout_s=timeout_s,  # type: ignore[arg-type]
        backend="triton" if device == "cuda" else "torch",
        start_timeout_s=600.0 if device == "cuda" else 120.0,  # kernels are compiled and timed
        **more,
    )


@click.command()
@click.argument("plan")
@click.option("--model", "model_name", help="Model preset or config.json; default: the scenario's, or that beside the plan.")
@engine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; the default is this machine only.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0 takes a free one."
)
@click.option(
    "--max-outstanding",
    type=click.IntRange(1, 100_000),
    default=1024,
    show_default=True,
    help="Requests in flight before others get 429.",
)
@click.option("--served-model-name", help="Name in /v1/models; default: the model's.")
@click.option("--recover/--no-recover", default=True, show_default=True, help="Go on without ranks that are lost, or end.")
@click.option("--stall-timeout", "stall_timeout_s", type=click.FloatRange(0.1, 3600), default=30.0, show_default=True,
              callback=a_number, help="Seconds without progress after which a rank that is alive counts as lost.")
def serve(
    plan: str,
    model_name: str | None,
    checkpoint: Path | None,
    device: str,
    dtype: str | None,
    timeout_s: float,
    host: str,
    port: int,
    max_outstanding: int,
    served_model_name: str | None,
    recover: bool,
    stall_timeout_s: float,
) -> None:
    """Serve PLAN (a plan.json, a run directory, or a scenario that states a plan: try `tiny_cpu`) as an OpenAI-compatible API.

    Answers /v1/chat/completions, /v1/completions and /v1/models, streaming and not; /metrics, /health, /livez, /readyz.
    When EPTWIN_API_KEY is set, requests need `Authorization: KEY` or `Authorization: Bearer KEY`. SIGTERM drains.
    """
    chosen, model = plan_and_model(plan, model_name)
    options = make_options(checkpoint, device, dtype, timeout_s, recover=recover, stall_timeout_s=stall_timeout_s)
    settings = GatewaySettings(
        model_name=served_model_name or model.name, max_context=model.max_context, max_outstanding=max_outstanding
    )
    click.echo(f"starting {chosen.gpus} ranks of {model.name}: {chosen.name}", err=True)
    try:
        run_gateway(
            lambda: Frontend(chosen, model, options),
            settings=settings,
            vocab=model.vocab,
            tokenizer_folder=checkpoint,
            host=host,
            port=port,
            on_start=lambda bound: click.echo(f"serving on http://{host}:{bound}/v1", err=True),
        )
    except OSError as error:
        raise EptwinError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def plan_and_model(source: str, model_name: str | None) -> tuple[Plan, ModelSpec]:
    """The plan and its model: a scenario states both; a plan.json has scenario.yaml beside it, or `model_name` says."""
    path = Path(source)
    if path.is_dir():
        path = path / "plan.json"
        source = str(path)
    if path.suffix == ".json":
        beside = path.parent / "scenario.yaml"
        if model_name is None and not beside.is_file():
            raise SpecError("which model?", file=path, hint="give --model, or keep scenario.yaml beside the plan")
        model = load_model(model_name) if model_name else load_scenario(beside).model
        return load_plan(path, model), model
    scenario = load_scenario(source)
    if scenario.plan is None:
        raise SpecError(
            "this scenario states no plan", file=source, field="plan", hint="`eptwin plan` finds one and writes plan.json"
        )
    model = load_model(model_name) if model_name else scenario.model
    check_plan(scenario.plan, model, scenario.cluster, file=source)
    return scenario.plan, model


@click.command()
@click.argument("url")
@click.option(
    "--workload", "workload_file", type=click.Path(path_type=Path), help="A workload YAML, or a scenario (its workload)."
)
@click.option("--concurrency", type=click.IntRange(1, 10_000), help="Closed loop with this many users.")
@click.option("--rate", type=click.FloatRange(0.001, 100_000), callback=a_number, help="Poisson arrivals, requests per second.")
@click.option(
    "--requests", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Requests without a workload file."
)
@click.option(
    "--isl", type=click.IntRange(1, 1_000_000), default=128, show_default=True, help="Prompt tokens without a workload file."
)
@click.option(
    "--osl", type=click.IntRange(1, 1_000_000), default=32, show_default=True, help="Output tokens without a workload file."
)
@click.option("--model", default="", help="Model name to ask for; default: what the service lists first.")
@click.option(
    "--gpus", type=click.IntRange(1, 100_000), default=1, show_default=True, help="GPUs behind the URL, for rates per GPU."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of arrivals, lengths and prompts."
)
@click.option("--allow-remote", is_flag=True, help="Allow a URL that is not this machine. Only load what is yours.")
@click.option("--out", type=click.Path(path_type=Path), callback=out_folder, help="Write results.json and requests.jsonl here.")
@click.option("--json", "as_json", is_flag=True, help="Print the Measurement as one JSON document.")
def bench(
    url: str,
    workload_file: Path | None,
    concurrency: int | None,
    rate: float | None,
    requests: int,
    isl: int,
    osl: int,
    model: str,
    gpus: int,
    seed: int,
    allow_remote: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Load the OpenAI-compatible service at URL (e.g. http://127.0.0.1:8000) and measure TTFT, TPOT, throughput.

    The key, if it needs one, comes from EPTWIN_API_KEY. The result has the schema of a prediction, so that
    `eptwin validate pair` compares the two. Ctrl-C ends the load and keeps what was measured.
    """
    workload = _workload(workload_file, concurrency, rate, requests, isl, osl)
    done = run_bench(
        url, workload, BenchOptions(model=model, gpus=gpus, seed=seed, allow_remote=allow_remote), progress=stderr_progress
    )
    if as_json:
        click.echo(dump_json(done.result), nl=False)
    else:
        click.echo(_text(done.result.latencies, done.result.throughput.output_tok_per_s, done.result.counts.finished))
    for failure in done.failures:
        click.echo(f"{failure.count} x {failure.kind}: {'; '.join(failure.samples)}", err=True)
    if out is not None:
        write_run(out, result=done.result, requests=done.records)
        click.echo(f"wrote {out}", err=True)
    if done.interrupted:
        raise KeyboardInterrupt
    if done.result.counts.finished == 0:
        raise EptwinError("no request was answered")


def _text(latencies: Any, output_tok_per_s: float, finished: int) -> str:
    lines = [f"{finished} requests finished, {output_tok_per_s:.4g} output tok/s"]
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        s = getattr(latencies, name)
        lines.append(
            f"{name.removesuffix('_s').upper():5} mean {format_s(s.mean):>9}  p50 {format_s(s.p50):>9}  p99 {format_s(s.p99):>9}"
        )
    return "\n".join(lines)


def _workload(file: Path | None, concurrency: int | None, rate: float | None, requests: int, isl: int, osl: int) -> WorkloadSpec:
    if file is not None:
        if concurrency or rate:
            raise SpecError("--workload states its own arrivals", hint="leave out --concurrency and --rate")
        try:
            return load_workload(file)
        except SpecError as error:
            if not any(p.field == "workload" for p in error.problems):
                raise
            return load_scenario(file).workload
    if concurrency and rate:
        raise SpecError("--concurrency and --rate exclude one another")
    arrivals = Arrivals(kind="poisson", rate_per_s=rate) if rate else Arrivals(kind="closed_loop", concurrency=concurrency or 4)
    return WorkloadSpec(
        name="bench",
        arrivals=arrivals,
        isl=Lengths(kind="fixed", mean=float(isl)),
        osl=Lengths(kind="fixed", mean=float(osl)),
        requests=requests,
    )
