"""The simulator: SimPy processes that make the decisions of `twin.policy` at the prices of `twin.cost`."""

from twin.sim.simulate import SimOutput, simulate

__all__ = ["SimOutput", "simulate"]
