"""Answers of a given form: grammars that requests name, and calls of tools."""
