"""What the training scripts share: data, checkpoints, run folders, arguments."""
