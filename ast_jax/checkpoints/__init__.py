"""Checkpoints: Orbax folders, the Hugging Face Hub, PyTorch files, resizing to another input, and `load`."""
