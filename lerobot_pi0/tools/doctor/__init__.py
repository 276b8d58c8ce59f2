"""`lerobot-pi0 doctor`: what is wrong with a policy, its data and its robot, worst first, with the cure.

    inputs    what is examined, opened once          checks     the table of all checks, and their order
    finding    what a check says                      page       findings as text, and as JSON

Every other module holds the checks of one area: functions from a inputs to findings.
"""
