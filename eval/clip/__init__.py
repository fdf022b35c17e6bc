"""CLIP models on their own: search pictures and texts, classify without training, score captions.

Each command takes any encoder of `flamingo.eval.embedding` that has pictures and texts in one space.
"""
