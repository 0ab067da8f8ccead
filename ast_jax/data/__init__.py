"""Data sets to examples: manifests and folder layouts, splits and folds, audits, waveform mixup."""
