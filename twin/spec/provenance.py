"""Who made a result: versions, commit, seed and the digest of what was asked."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path

from twin.spec.base import Spec
from twin.spec.results import Provenance

_LIBRARIES = ("simpy", "numpy", "networkx", "pydantic")


def provenance(
    *specs: Spec, seed: int = 0, profiles: tuple[str, ...] = (), command: str = "", libraries: tuple[str, ...] = _LIBRARIES
) -> Provenance:
    """Provenance of a result that `specs` determine. Reads package metadata and the checkout's HEAD; runs nothing."""
    digest = hashlib.sha256()
    for spec in specs:
        digest.update(type(spec).__name__.encode())
        digest.update(spec.model_dump_json().encode())
    return Provenance(
        tool_version=_version("eptwin"),
        git_commit=_commit(),
        seed=seed,
        spec_sha256=digest.hexdigest(),
        profiles=profiles,
        libraries={name: _version(name) for name in libraries},
        host=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        command=command,
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The checkout's commit, or '' when this is not a checkout. Reads .git as files, so that git need not be there."""
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="ascii").strip()
        if not head.startswith("ref: "):
            return head[:40]
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="ascii").strip()[:40]
        for line in (git / "packed-refs").read_text(encoding="ascii").splitlines():
            if line.endswith(f" {name}"):
                return line[:40]
    except (OSError, UnicodeDecodeError):
        pass
    return ""
