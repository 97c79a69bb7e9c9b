"""Checkpoints in and out: Hugging Face directories and hub ids, peft adapters, fingerprints and origins."""
