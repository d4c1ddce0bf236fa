"""Chain-of-thought decoding on the same backbone."""
