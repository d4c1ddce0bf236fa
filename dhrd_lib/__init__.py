"""DHRD Workbench: train a decoder-only LM as a classifier together with its own LM head on rationales."""

__version__ = "0.1.0"
