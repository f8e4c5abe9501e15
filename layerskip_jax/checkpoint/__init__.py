"""Checkpoints on disk, ours and those of Hugging Face."""
