"""The command line: parse arguments, call a command, print the result. No logic, and no import that slows `--help`."""

# --help lists the commands in the order of these imports.
from pipeline.cli import train

# isort: split
from pipeline.cli import cluster

# isort: split
from pipeline.cli import inspect
from pipeline.cli.app import app, main

__all__ = ["app", "cluster", "inspect", "main", "train"]
