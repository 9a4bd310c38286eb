"""Exclusive write access to a run: claims of attempts, locks, heartbeats, and detection of failed writers."""
