"""Makes scenes: digits, sprites, backgrounds, and the places of objects."""
