"""A robot whose joints are not the checkpoint's is refused, with what differs and how to mend it."""

import json
import logging
import re
from dataclasses import replace

import draccus
import pytest
from tiny_policy import ACTION, STATE, tiny_config

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.inputs.joints import check_joints

STATES = ["pan.pos", "lift.pos", "elbow.pos", "wrist.pos", "gripper.pos"]
ACTIONS = STATES[:ACTION]


def trained() -> Pi0Config:
    return tiny_config(state_feature_names=STATES, action_feature_names=ACTIONS)


def fault(state: list[str], action: list[str]) -> str:
    with pytest.raises(ValueError, match="not those that the checkpoint was trained on") as caught:
        check_joints(trained(), state, action)
    return str(caught.value)


def test_the_same_joints_in_the_same_order_pass_in_silence(caplog):
    check_joints(trained(), STATES, ACTIONS)
    assert not caplog.records


def test_another_order_is_refused_and_both_lists_are_shown():
    said = fault(STATES, ACTIONS[::-1])
    assert "action, permuted" in said
    assert str(ACTIONS) in said
    assert str(ACTIONS[::-1]) in said
    assert "state" not in said.split("\n", 1)[1]
    assert "state, permuted" in fault([*STATES[1:], STATES[0]], ACTIONS)


def test_renamed_joints_come_with_the_flag_that_says_they_are_the_same():
    robot = ["main_pan", *ACTIONS[1:]]
    said = fault(STATES, robot)
    assert "renamed: 'pan.pos' → 'main_pan'" in said
    (names,) = re.findall(r"--policy\.action_feature_names='(.*?)'", said)
    assert f'"action_feature_names": {names} into the checkpoint' in said  # `serve` has no such flag
    config = replace(trained(), action_feature_names=draccus.decode(list[str], json.loads(names)))
    check_joints(config, STATES, robot)


def test_missing_and_added_joints_are_named():
    said = fault([*STATES, "extra.vel"], ACTIONS[:-1])
    assert "action, missing from the robot: ['wrist.pos']" in said
    assert "state, added by the robot: ['extra.vel']" in said
    assert "feature_names=" not in said


def test_swapped_joints_one_of_which_is_renamed_as_well_are_not_called_the_same():
    said = fault(STATES, ["lift.pos", "pan.pos", "elbow.pos", "main_wrist"])
    assert "action, permuted" in said
    assert "feature_names=" not in said


def test_a_checkpoint_without_names_is_told_once_and_its_number_of_joints_is_checked(caplog):
    with caplog.at_level(logging.WARNING):
        check_joints(tiny_config(), STATES, ACTIONS)
    assert len(caplog.records) == 1
    assert "cannot be checked" in caplog.text
    with pytest.raises(ValueError, match=f"state: the checkpoint has {STATE} dimensions, without names"):
        check_joints(tiny_config(), STATES[1:], ACTIONS)
