"""Training under DeepSpeed. Lies at the top level, is imported as `flamingo.train`."""

if __name__ != "flamingo.train":
    raise ImportError(f"import flamingo.train, not {__name__}: the folder is part of the package")
