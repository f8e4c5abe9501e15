"""The default corpus: a TFDS builder for the local Python standard library."""
