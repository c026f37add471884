"""From raw folders to batches: cards, shards, decoded cache, plans, captions."""
