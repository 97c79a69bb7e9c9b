"""Finetuning jobs and the files that they read and write, in one directory that survives a crash.

A job's life: `jobs` takes it, `loader` reads its examples, `scheduler` gives it optimizer steps, `running_job` keeps
what came out of its trainer, `repository` writes that down in SQLite. No HTTP and no tensors here.
"""
