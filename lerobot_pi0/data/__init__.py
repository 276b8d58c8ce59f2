"""What a dataset contributes: statistics, normalization, relative actions, checks of the first batch."""
