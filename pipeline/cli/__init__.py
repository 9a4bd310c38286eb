"""The command line: parse, call a verb, print. No logic, and no import that `--help` would wait for."""

# In the order that --help lists their commands.
from pipeline.cli import training

# isort: split
from pipeline.cli import remote

# isort: split
from pipeline.cli import looking
from pipeline.cli.app import app, main

__all__ = ["app", "looking", "main", "remote", "training"]
