"""The decoder: one implementation for training, serving and finetuning."""
