"""Weights of other Flamingos -> model folders of this one. One file per kind of checkpoint."""
