"""What lies on disk: layouts of published checkpoints, strict loading, adapters, golden actions."""
