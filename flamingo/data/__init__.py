"""Plain WebDataset shards -> documents -> batches, in an order that is a function of position.

Read the files in this order: `document`, `kinds/`, `shards`, `stream`, `batch`, `steps`.
Nothing is imported here, so that `flamingo --help` does not wait for torch.
"""
