"""Standard streams and signals. Needs only the standard library."""
