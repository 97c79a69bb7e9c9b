"""Finetuning jobs and the files that they read and write, in one directory that survives a crash.

A job's life: `jobs` takes it, `dataset` reads its examples, `turns` gives it optimizer steps, `run` keeps what came out
of its `trainer`, `journal` writes that down in SQLite. No HTTP here; numbers are in `lora`
alone.
"""
