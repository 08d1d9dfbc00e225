"""`eptwin export`."""

from __future__ import annotations

from pathlib import Path

import click

from twin.commands.shared import say
from twin.plan.export import FORMATS, notes
from twin.plan.export import export as write_export
from twin.spec.check import check_plan
from twin.spec.errors import SpecError
from twin.spec.load import load_cluster, load_model, load_plan, load_scenario
from twin.spec.options import out_file
from twin.spec.rundir import write_text


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(sorted(FORMATS)), required=True, help="Whose words to write the plan in.")
@click.option("--model", help="Model preset or config.json; default: that of scenario.yaml beside the plan.")
@click.option("--cluster", help="Cluster preset or file; default: that of scenario.yaml beside the plan.")
@click.option("--image", default="IMAGE", show_default=True, help="Container image of Kubernetes and PAI-EAS exports.")
@click.option("--instance-type", default="", help="Instance type of a PAI-EAS export, e.g. ml.gu8tea.8.48xlarge.")
@click.option("--out", type=click.Path(path_type=Path), callback=out_file, help="Write to this file instead of stdout.")
def export(
    plan: Path, kind: str, model: str | None, cluster: str | None, image: str, instance_type: str, out: Path | None
) -> None:
    """Write PLAN (a plan.json, or a run directory) for vLLM, SGLang, LeaderWorkerSet, Dynamo or PAI-EAS.

    What the target cannot express is said in the output and on stderr.
    """
    if plan.is_dir():
        plan = plan / "plan.json"
    beside = plan.parent / "scenario.yaml"
    scenario = load_scenario(beside) if (model is None or cluster is None) and beside.is_file() else None
    if scenario is None and (model is None or cluster is None):
        raise SpecError(
            "which model and cluster?", file=plan, hint="give --model and --cluster, or keep scenario.yaml beside the plan"
        )
    the_model = load_model(model) if model else scenario.model  # type: ignore[union-attr]
    the_cluster = load_cluster(cluster) if cluster else scenario.cluster  # type: ignore[union-attr]
    loaded = load_plan(plan, the_model)
    check_plan(loaded, the_model, the_cluster, file=str(plan))
    text = write_export(loaded, the_model, the_cluster, kind, image=image, instance_type=instance_type)
    for note in notes(loaded, kind):
        say(f"not carried over: {note}")
    if out is None:
        click.echo(text, nl=False)
    else:
        write_text(out, text)
        say(f"wrote {out}")
