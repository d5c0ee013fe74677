"""A model in memory: loaded, run layer by layer, scored."""
