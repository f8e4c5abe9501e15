"""Checkpoints on disk: runs of this project, and Hugging Face Llamas."""
