"""Tools that make, check and show shards: `flamingo data pack | index | verify | stats | show | convert`."""
