"""Experiments that take hours: reproductions of what the paper claims."""
