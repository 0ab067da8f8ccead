"""Examples to checkpoints: configuration, input pipeline, the training step, the trainer, metrics, evaluation."""
