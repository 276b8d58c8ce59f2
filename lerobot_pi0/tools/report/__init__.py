"""`lerobot-pi0 report`: a policy beside recorded actions and open-loop baselines, as a page."""
