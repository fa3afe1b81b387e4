"""Models: what a name stands for, tokenizers, bases, adapters, references, reward heads."""
