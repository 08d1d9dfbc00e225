"""The `eptwin` command. Commands load by name when called, so that `eptwin plan` never imports torch.

Exit codes: 0 answered; 1 an honest "no"; 2 bad input; 70 a bug; 130 Ctrl-C. Data goes to stdout, talk to stderr.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import click

from twin.spec.errors import EptwinError, SpecError

COMMANDS = {
    "plan": "twin.commands.plan:plan",
    "size": "twin.commands.plan:size",
    "simulate": "twin.commands.simulate:simulate",
    "run": "twin.commands.run:run",
    "serve": "runtime.cli:serve",
    "bench": "runtime.cli:bench",
    "calibrate": "twin.commands.run:calibrate",
    "validate": "twin.commands.validate:validate",
    "watch": "twin.commands.watch:watch",
    "report": "reports.cli:report",
    "export": "twin.commands.export:export",
    "import": "twin.commands.imports:import_",
    "presets": "twin.commands.presets:presets",
    "schema": "twin.commands.presets:schema",
    "demo": "twin.commands.demo:demo",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("twin", "runtime", "reports"):
                raise
            raise click.UsageError(
                f"`eptwin {cmd_name}` needs the package {error.name!r}; install it with: pip install 'eptwin[runtime]'"
            ) from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in COMMANDS])


SUMMARIES = {
    "plan": "Search the plans for a scenario; rank them and explain.",
    "size": "Find the fewest GPUs that serve a scenario's load.",
    "simulate": "Predict what one plan does.",
    "run": "Execute a plan for real and measure it.",
    "serve": "Serve a plan as an OpenAI-compatible API.",
    "bench": "Load a service and measure it.",
    "calibrate": "Measure this machine's operators into a profile.",
    "validate": "Compare predictions with measurements.",
    "watch": "Compare a live service with its twin.",
    "report": "Render a run directory as one HTML page.",
    "export": "Write a plan for vLLM, SGLang, Kubernetes or PAI-EAS.",
    "import": "Read models, traces, topologies and tables of others.",
    "presets": "List the shipped models, clusters, GPUs and scenarios.",
    "schema": "Print the JSON Schema of a file format.",
    "demo": "Plan, run, compare and report, on this machine.",
}

EPILOG = """\b
A first question:
  eptwin plan r1_chat --out run/r1       which plan serves DeepSeek-R1 on 4 x 8 H200?
  eptwin simulate r1_chat --plan run/r1/plan.json --set workload.arrivals.rate_per_s=30
  eptwin report run/r1                    one self-contained page
\b
Shell completion: eval "$(_EPTWIN_COMPLETE=bash_source eptwin)"   (or zsh_source, fish_source)
Every option can come from the environment: EPTWIN_PLAN_WORKERS=2 is `eptwin plan --workers 2`.
Exit codes: 0 answered, 1 an honest "no", 2 bad input, 70 a bug, 130 interrupted."""


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="eptwin")
def cli() -> None:
    """A digital twin and a runtime for serving Mixture-of-Experts models with expert parallelism."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a documented code."""
    sys.exit(_code(arguments))


def _code(arguments: list[str] | None) -> int:
    try:
        result: Any = cli.main(arguments, prog_name="eptwin", standalone_mode=False, auto_envvar_prefix="EPTWIN")
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EptwinError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader left (`| head`): end quietly, and keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # a place of the user's: a full disk, a name too long
            click.echo(f"error: {str(error.filename)[:300]}: {error.strerror}", err=True)
            return SpecError.exit_code
        traceback.print_exc()
        click.echo("this is a bug in eptwin; please report it with the lines above", err=True)
        return 70


if __name__ == "__main__":
    main()
