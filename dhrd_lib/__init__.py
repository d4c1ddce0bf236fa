"""DHRD Workbench: train a decoder-only LM as a classifier together with its own LM head on rationales."""
