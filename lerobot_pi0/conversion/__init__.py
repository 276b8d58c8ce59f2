"""`lerobot-pi0 convert`: π0 policies of other projects ↔ ours, with all that belongs to a policy."""
