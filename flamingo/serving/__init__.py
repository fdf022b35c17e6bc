"""The room of those who ask: one prompt on a page, in a terminal, or many from a file.

Knows the model and its processor; knows nothing of training and evaluation.
"""
