"""Which process may write a run: claims of attempts, locks, heartbeats, and the verdict that a writer has failed."""
