"""A policy on a robot through LeRobot's own commands: what checks, serves, measures and records it."""
