"""How well a sub-network predicts: mean loss, perplexity, likelihoods of continuations."""
