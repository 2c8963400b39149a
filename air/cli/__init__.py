"""What the command lines share: flags, configurations, errors, signals."""
