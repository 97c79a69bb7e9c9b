"""Evaluation of sub-networks."""

from flextron.evals.perplexity import Perplexity, evaluate_perplexity

__all__ = ["Perplexity", "evaluate_perplexity"]
