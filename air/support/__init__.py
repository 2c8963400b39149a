"""Plumbing below the model: checks, images, indices, handlers of Pyro, settings."""
