"""The streams and signals of a process. Needs the standard library alone."""
