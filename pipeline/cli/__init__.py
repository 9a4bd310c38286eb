"""The command line: parse, call a verb, print. No logic, and no import that `--help` would wait for."""

# In the order that --help lists their commands.
from pipeline.cli import train

# isort: split
from pipeline.cli import cluster

# isort: split
from pipeline.cli import inspect
from pipeline.cli.app import app, main

__all__ = ["app", "cluster", "inspect", "main", "train"]
