"""`python -m benchmarks.netlab`: build the labs, time the runtime's communication in them, compare with the twin."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.netlab.cases import LABS
from benchmarks.netlab.lab import LabError, alone, go_first, remove_all, require
from benchmarks.netlab.schedule import Constants
from benchmarks.netlab.study import fit, halves, measure, rows, summary
from twin.spec.rundir import write_text

_OUT = Path(__file__).resolve().parents[1] / "results" / "netlab.json"


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 not possible here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.netlab", description=__doc__)
    parser.add_argument("--out", type=Path, default=_OUT, help="JSON to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of cases and of the halves")
    parser.add_argument("--labs", type=int, nargs="*", help="only these labs, by number; default: all")
    parser.add_argument("--no-pd", action="store_true", help="leave out the whole runs with separate prefill and decode")
    parser.add_argument("--again", action="store_true",
                        help="measure nothing: have the simulator predict the whole runs of --out again")
    parser.add_argument("--clean", action="store_true", help="only remove what an earlier run left standing")
    asked = parser.parse_args(arguments)
    if asked.again:
        return _again(asked.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that labs are taken down
    try:
        require()
        if asked.clean:
            with alone():
                remove_all()
            return 0
        go_first()
        return _study(asked)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _study(asked: argparse.Namespace) -> int:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr)

    labs = [lab for number, lab in enumerate(LABS) if asked.labs is None or number in asked.labs]
    timings = measure(labs, asked.seed, say)
    fitted, reported = halves(timings, asked.seed)
    constants = fit(fitted)
    table = rows(fitted, constants, "fitted") + rows(reported, constants, "reported")
    result: dict[str, Any] = {
        "command": "python -m benchmarks.netlab", "seed": asked.seed, "cores": os.cpu_count(),
        "load": [round(v, 2) for v in os.getloadavg()],
        "constants": {"late_s": constants.late_s, "begin_s": round(constants.begin_s, 6)},
        "summary": summary([row for row in table if row["half"] == "reported"]),
        "summary_fitted": summary([row for row in table if row["half"] == "fitted"]), "rows": table}
    if not asked.no_pd:
        from benchmarks.netlab.pd import study_pd

        result["pd"] = study_pd(constants, asked.seed, say)
    result["wall_s"] = round(time.monotonic() - began, 1)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(asked.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("constants", "summary", "wall_s")}, indent=1))
    _print_pd(result.get("pd", []))
    say(f"wrote {asked.out}")
    return 0


def _again(out: Path) -> int:
    from benchmarks.netlab.pd import predict_again

    result = json.loads(out.read_text(encoding="utf-8"))
    result["pd"] = predict_again(result["pd"], Constants(**result["constants"]), result["seed"])
    write_text(out, json.dumps(result, indent=1) + "\n")
    _print_pd(result["pd"])
    return 0


def _print_pd(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        for name, pair in run["compared"].items():
            print(f"{run['name']}: {name} predicted {pair['predicted']:.4g}, measured {pair['measured']:.4g}, "
                  f"{100 * pair['error']:+.1f}%")


if __name__ == "__main__":
    sys.exit(main())
