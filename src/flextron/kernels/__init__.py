"""Compiled kernels for the CPU: one decoder iteration, adapters, chunks in training; weights in eight and four bits."""
