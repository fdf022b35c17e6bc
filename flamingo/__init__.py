"""Flamingo: a frozen language model that sees, through gated cross-attention.

Importing this package registers the model with transformers' Auto classes.
"""

__version__ = "0.1.0"
