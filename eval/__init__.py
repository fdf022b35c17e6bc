"""Few-shot evaluation. Lies at the top level, is imported as `flamingo.eval`."""

if __name__ != "flamingo.eval":
    raise ImportError(f"import flamingo.eval, not {__name__}: the folder is part of the package")
