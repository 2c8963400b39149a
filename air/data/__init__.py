"""Scenes as arrays: made here (`synthetic`) or read from users' files (`user_images`)."""
