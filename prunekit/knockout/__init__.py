"""Which layers are cheap: scored in memory, searched, trained without them, ranked."""
