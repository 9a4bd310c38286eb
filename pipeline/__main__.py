"""`python -m pipeline` is the command `trainyard`."""

from pipeline.cli import main

main()
