"""The default corpus: the Python standard library on this machine, as a TFDS builder."""
