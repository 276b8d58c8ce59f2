"""`lerobot-pi0 doctor`: checks of a policy, its data and its robot; findings worst first, each with a fix.

    inputs     the inputs under test, opened once     checks     the table of all checks, and their order
    finding    the result of a check                  page       findings as text, and as JSON

Every other module holds the checks of one area: functions from the inputs to findings.
"""
