"""What the commands open: a policy, a dataset, a robot's joints."""
