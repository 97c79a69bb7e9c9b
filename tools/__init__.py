"""Commands for the maintainers of this repository; they are not part of the package."""
