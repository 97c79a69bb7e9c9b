"""Finetuning jobs and the files that they read and write, in one directory that survives a crash.

A job's life: `jobs` takes it, `dataset` reads its examples, `shares` says when it is its turn, `run` takes an optimizer
step with a `trainer` and keeps what came out, `journal` writes that down in SQLite. No HTTP here; numbers are in `lora`
alone.
"""
