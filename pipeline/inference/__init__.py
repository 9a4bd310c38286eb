"""Trained models: loaded with their preprocessing, called on raw inputs."""
