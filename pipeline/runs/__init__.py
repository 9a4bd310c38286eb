"""Durable state of a run: its directory, journal, lease, checkpoints and metric log."""
