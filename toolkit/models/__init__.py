"""Model files: the toolkit's checkpoints, published Keras 2 files, and exports."""
