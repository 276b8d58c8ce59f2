"""What `lerobot-pi0 bench` runs: this π0 or π0.5 beside LeRobot's in-tree one, on the machine at hand."""
