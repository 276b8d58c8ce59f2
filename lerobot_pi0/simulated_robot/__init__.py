"""An SO-101 arm that is simulated in real time, as a LeRobot robot, and a script that operates it: for tests
and for trying things without hardware.
"""
