"""PyTorch checkpoints, without PyTorch: reading, conversion, export and verification."""
