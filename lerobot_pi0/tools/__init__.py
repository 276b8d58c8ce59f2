"""Tools that explain a policy or a dataset, and turn checkpoints into one another. Nothing imports them but
the command line."""
