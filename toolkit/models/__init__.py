"""Model files: our checkpoints, published Keras 2 files, and exports."""
