"""`lerobot-pi0 convert` and `merge`: checkpoints of other projects ↔ ours; adapters → a plain checkpoint."""
