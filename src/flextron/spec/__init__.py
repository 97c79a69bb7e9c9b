"""What a sub-network is, which ones exist, and how a user asks for one: frozen values, JSON, no torch."""

from flextron.spec.space import SearchSpace
from flextron.spec.subnet import LayerSpec, SubnetSpec
from flextron.spec.target import Target

__all__ = ["LayerSpec", "SearchSpace", "SubnetSpec", "Target"]
