"""The simulator: SimPy processes that make the decisions of `twin.policy` at the prices of `twin.cost`."""

from twin.sim.simulate import GivenUp, SimOutput, simulate

__all__ = ["GivenUp", "SimOutput", "simulate"]
