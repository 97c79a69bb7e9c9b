"""`python -m flextron` is the command line."""

from flextron.cli.main import main

main()
