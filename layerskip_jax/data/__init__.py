"""From a corpus to packed batches: sources, the SentencePiece tokenizer, and the grain pipeline."""
