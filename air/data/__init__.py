"""Where scenes come from: digits, sprites, arrays and files. Only `streaming` needs torch."""
