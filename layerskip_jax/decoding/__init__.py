"""Generation: prefill, plain decoding, early exit, and self-speculation with one KVQ cache (LayerSkip section 4.3)."""
