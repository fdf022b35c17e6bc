"""What a run needs, known before it is paid for: see `flamingo.train.plan`."""
