"""Several equal servers behind one address, on Ray Serve: where a request goes, and what becomes of it when one dies.

Ray is an extra, so only the modules that need it import it: `router`, `application` and `run`.
"""
