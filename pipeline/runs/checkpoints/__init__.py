"""Checkpoints: what they hold, their files and manifests, and how they are read safely."""
