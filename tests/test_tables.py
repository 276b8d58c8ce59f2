"""Tables as text."""

from lerobot_pi0.tables import format_table


def test_the_first_column_is_aligned_to_the_left_and_numbers_to_the_right():
    text = format_table([("task", "success", "n"), ("open the faucet", "9 %", "40"), ("push", "100 %", "7")])
    assert text.splitlines() == [
        "task             success   n",
        "----------------------------",
        "open the faucet      9 %  40",
        "push               100 %   7",
    ]
