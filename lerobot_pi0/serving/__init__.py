"""The policy server of LeRobot's asynchronous inference."""
