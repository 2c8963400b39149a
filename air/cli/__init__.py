"""Shared by the command lines: flags, configurations, errors, progress."""
