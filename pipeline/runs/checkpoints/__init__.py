"""Checkpoints: their content, their files and manifests, and safe loading."""
