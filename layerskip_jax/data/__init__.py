"""From a corpus to packed batches: sources, tokenizers, and the grain pipeline."""
