"""Data readers, splits, alignment variants and the embedded data."""
