"""Load, export and quantize trained classifiers."""
