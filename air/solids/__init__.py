"""Solids in 3-D: AIR with a given renderer (section 3.3 of the paper)."""
