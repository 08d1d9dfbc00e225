"""What every command checks of its options before it works: callbacks for click, which this room does without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from twin.spec.errors import SpecError
from twin.spec.rundir import check_out


def out_folder(_context: Any, _option: Any, path: Path | None) -> Path | None:
    """A folder to write: refused at once where it cannot be."""
    return check_out(path)


def out_file(_context: Any, _option: Any, path: Path | None) -> Path | None:
    """A file to write: refused at once where it cannot be."""
    return check_out(path, folder=False)


def a_number(_context: Any, option: Any, value: float | None) -> float | None:
    """A number: NaN lies within every range, as comparisons go."""
    if value is not None and math.isnan(value):
        raise SpecError("nan is not a number", field=str(option.opts[-1]))
    return value
