"""Compiled kernels for the CPU: one decoder iteration, adapters, training windows; weights in eight and four bits."""
