"""Rate, periods and stalls of a loop whose times are given."""

import pytest

from lerobot_pi0.control.loop_timing import loop_timing

FPS = 10.0
TIMES = [0.0, 0.1, 0.6, 0.7, 1.0, 1.1]  # stalls of 0.4 s and of 0.2 s


@pytest.mark.parametrize(
    ("waits", "policy", "others"),
    [
        ([0, 0, 0.4, 0, 0.2, 0], 2, 0),
        ([0, 0, 0.3, 0, 0.05, 0], 1, 1),  # it is the policy's if most of what is missing is
        ([9, 0.1, 0.1, 0.1, 0.05, 0.1], 0, 2),  # before the first action there is no stall
    ],
)
def test_a_stall_is_the_policys_if_the_loop_waited_for_it_most_of_the_time(waits, policy, others):
    timing = loop_timing([TIMES], FPS, [waits])
    assert (timing.stalls, timing.waits) == (2, policy)
    assert timing.causes == (
        f"in {policy} of the stalls the loop waited for the policy, in {others} for the robot, its cameras "
        "or the computer"
    )


def test_stalls_are_told_with_their_number_and_length():
    said = str(loop_timing([TIMES], FPS))
    assert said == "6 actions in 1.1 s: 4.5 per second of 10, 2 stalls of 0.60 s in all, the longest 0.40 s"
    assert "1 stall of 0.40 s" in str(loop_timing([TIMES[:4]], FPS))
    assert "no stalls" in str(loop_timing([TIMES[:2]], FPS))
    assert "is not known" in loop_timing([TIMES], FPS).causes
