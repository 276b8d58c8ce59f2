"""`lerobot-pi0 report`: a policy beside recorded actions and naive baselines, as a page."""
