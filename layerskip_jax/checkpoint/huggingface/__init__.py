"""Llama checkpoints as Hugging Face lays them out: config.json, safetensors and tokenizer files, read and written."""
