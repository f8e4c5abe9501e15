"""The LayerSkip recipe: layer dropout, early exits and their loss."""
