"""Text from a decoder: prompts to tokens, sampling, plain generation, tokens to text."""
