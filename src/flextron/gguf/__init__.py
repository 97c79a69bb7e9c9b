"""GGUF files as if they were Hugging Face checkpoints: format, keys, shapes, tokenizers."""
