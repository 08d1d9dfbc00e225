"""Rules of the house that a machine can check: sizes, forbidden calls, lazy imports, documented commands."""

import ast
import subprocess
import sys
from pathlib import Path

import click
import pytest

from twin.cli import COMMANDS, SUMMARIES, cli

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for room in ("twin", "runtime", "reports", "benchmarks") for p in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_size_of_files_and_functions(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "a file over 400 lines wants splitting"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 70, f"{node.name} is over 70 lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if isinstance(node.func, ast.Name):
                assert name not in FORBIDDEN_NAMES, f"{path}:{node.lineno} calls {name}"
            keywords = {k.arg: k.value for k in node.keywords}
            for flag in ("shell", "trust_remote_code"):
                value = keywords.get(flag)
                assert not (isinstance(value, ast.Constant) and value.value), f"{path}:{node.lineno} sets {flag}"
            if name == "load" and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                assert node.func.value.id != "torch", f"{path}:{node.lineno}: weights come from safetensors only"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not FORBIDDEN_MODULES & {m.partition(".")[0] for m in modules}, f"{path}:{node.lineno}"


def test_plan_never_imports_torch():
    code = (
        "import sys; from twin.cli import _code; "
        "assert _code(['plan', '--help']) == 0 and _code(['simulate', '--help']) == 0; "
        "import twin.plan.search; "
        "assert not {'torch', 'plotly', 'runtime', 'reports'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def test_every_command_is_listed_and_documented():
    assert set(COMMANDS) == set(SUMMARIES)
    readme = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"eptwin {name}" in readme, f"README does not show `eptwin {name}`"


def _commands(command, path):
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from _commands(command.get_command(context, name), [*path, name])


def test_every_help_teaches():
    for path in _commands(cli, []):
        command, context = cli, click.Context(cli)
        for name in path:
            command = command.get_command(context, name)
            context = click.Context(command, parent=context, info_name=name)
        assert len(command.get_help(context)) > 100, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name not in ("out", "nodes", "version"):
                assert parameter.help or parameter.hidden, f"{path} {parameter.name} has no help"
