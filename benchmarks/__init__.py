"""What `lerobot-pi0 bench` runs: this π0 beside LeRobot's in-tree one, on the machine at hand."""
