"""Inference: trained models with their transforms, called on user data."""
