"""A run on disk: checkpoints, metrics, the folder that holds them."""
