"""`python -m pipeline` is `trainyard`."""

from pipeline.cli import main

main()
