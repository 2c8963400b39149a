"""Reads users' images: pictures and files of arrays, prepared for a model."""
