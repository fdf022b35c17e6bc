"""Contrastive training of a dual encoder (CLIP, SigLIP) on pairs shards: `flamingo clip train`.

Models and losses are open_clip's; data, checkpoints, signals and metrics are those of the other
training. What comes out is a folder that open_clip loads as `local-dir:FOLDER`, and a Flamingo takes
as its frozen encoder: `open_clip:FOLDER`.
"""
