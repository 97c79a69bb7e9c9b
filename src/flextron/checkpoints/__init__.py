"""Checkpoints in and out: Hugging Face directories, GGUF files, peft adapters; families as data."""
