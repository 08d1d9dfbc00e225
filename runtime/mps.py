"""Several ranks on one GPU, at the same time: CUDA's multi-process service (MPS), started for one run and ended after it.

Without it processes take turns on a GPU in slices of milliseconds, so that ranks that wait for each other wait for slices.
The service is an ordinary process of this user on a pipe directory of its own: it changes no setting of the device, and
programs that were not given the directory do not see it. As a command it runs another command inside:

    python -m runtime.mps torchrun --nproc-per-node 8 -m runtime.worker FOLDER/briefing.json
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_DRIVER_FOLDERS = ("/usr/bin", "/usr/local/nvidia/bin", "/usr/local/cuda/bin")
_PATIENCE_S = 20.0
OVERLAP = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
"""Lets symmetric memory have two ranks on one device (torch refuses by default, taking it for a mistake)."""


class MpsUnavailable(RuntimeError):
    """The service is not installed here or did not start."""


def find_control() -> str | None:
    """Path of nvidia-cuda-mps-control, which comes with the driver."""
    return shutil.which("nvidia-cuda-mps-control", path=os.pathsep.join([os.environ.get("PATH", ""), *_DRIVER_FOLDERS]))


@contextlib.contextmanager
def share_gpu() -> Iterator[dict[str, str]]:
    """Run the service; gives the variables that processes need in order to share the GPU through it.

    They must be in a process's environment before it first touches CUDA. Ends the service afterwards, when its clients
    should be gone. Raises MpsUnavailable.
    """
    control = find_control()
    if control is None:
        raise MpsUnavailable("nvidia-cuda-mps-control was not found: sharing a GPU needs the NVIDIA driver's MPS")
    with tempfile.TemporaryDirectory(prefix="eptwin-mps-") as folder:
        pipes, logs = Path(folder, "pipe"), Path(folder, "log")
        pipes.mkdir()
        logs.mkdir()
        places = {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(logs)}
        _tell(control, ["-d"], places, "")
        try:
            yield {**places, **OVERLAP, **_renumbered()}
        finally:
            _tell(control, [], places, "quit\n")


def _renumbered() -> dict[str, str]:
    """The service numbers the GPUs that it was shown from zero, and its clients must ask for them so."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {} if shown is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(shown.split(",")))))}


def _tell(control: str, arguments: list[str], places: dict[str, str], words: str) -> None:
    try:
        done = subprocess.run([control, *arguments], input=words, text=True, capture_output=True, timeout=_PATIENCE_S,  # noqa: S603
                              env={**os.environ, **places}, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise MpsUnavailable(f"{control}: {err}") from err
    if done.returncode:
        raise MpsUnavailable(f"{control} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[:300]}")


def main(command: list[str]) -> int:
    """Run a command with the service up; its exit code."""
    if not command:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    try:
        with share_gpu() as env:
            return subprocess.run(command, env={**os.environ, **env}, check=False).returncode  # noqa: S603 - the user's own
    except MpsUnavailable as err:
        sys.stderr.write(f"{err}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
