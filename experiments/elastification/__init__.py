"""The elastic adapter that the package ships: its training text, its run, and the curve of its losses."""
