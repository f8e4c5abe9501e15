"""Llama checkpoints in the format of Hugging Face: config.json, safetensors and tokenizer files, read and written."""
