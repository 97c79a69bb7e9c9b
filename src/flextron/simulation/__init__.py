"""Servers that are simulated: the real scheduler and policies, in the time that numbers of a machine say."""

from flextron.simulation.machine import Machine
from flextron.simulation.report import Simulated
from flextron.simulation.simulate import Scenario, simulate

__all__ = ["Machine", "Scenario", "Simulated", "simulate"]
