"""Which profiles answer for a GPU, an engine and a version: loaded once, their curves kept for all models of a search."""

from __future__ import annotations

from pathlib import Path

from twin.cost.interpolate import Interpolator
from twin.cost.local_experts import with_local
from twin.cost.profile import GpuPeaks, ProfileStore, gpu_key, load_profile, load_store
from twin.spec.cluster import GpuSpec, NetworkSpec
from twin.spec.errors import SpecError
from twin.spec.plan import Plan


class Evidence:
    """Interpolators over one store, made when first asked for. A CPU is answered by profiles of a CPU alone: nothing of a
    GPU transfers to it."""

    def __init__(self, store: ProfileStore) -> None:
        self.store = store
        self._made: dict[tuple[str, str, str | None, GpuPeaks], Interpolator | None] = {}

    @classmethod
    def load(cls, profile: str | Path | None = None) -> Evidence:
        """The profiles that ship with the package, and one file (or a folder of them) of the user's own."""
        shipped = with_local(load_store())
        if profile is None:
            return cls(shipped)
        path = Path(profile)
        own = tuple(load_store(path)) if path.is_dir() else (load_profile(path),)
        if not own:
            raise SpecError("holds no profile", file=path, expected="files named GPU-ENGINE.json")
        return cls(ProfileStore((*own, *shipped)))

    def interpolator(self, gpu: GpuSpec, network: NetworkSpec, plan: Plan) -> Interpolator | None:
        """What was measured of this GPU (or of its relatives) under the plan's engine; None where nothing applies."""
        peaks = GpuPeaks.of(gpu, network)
        key = (gpu.name, plan.engine, plan.engine_version, peaks)
        if key not in self._made:
            self._made[key] = self._make(gpu, plan, peaks)
        return self._made[key]

    def _make(self, gpu: GpuSpec, plan: Plan, peaks: GpuPeaks) -> Interpolator | None:
        on_cpu = tuple(profile for profile in self.store if gpu_key(profile.gpu).startswith("cpu"))
        profiles = on_cpu if gpu.kind == "cpu" else tuple(profile for profile in self.store if profile not in on_cpu)
        if not profiles:
            return None
        name = "cpu" if gpu.kind == "cpu" else gpu.name
        return Interpolator(ProfileStore(profiles), name, plan.engine, plan.engine_version, peaks)
