"""Joints: policy, dataset and robot have the same joints in the same order.

Vectors carry no names, so a wrong order raises no error and gives each joint the value of another.
"""

import json
from collections.abc import Iterator, Sequence

from lerobot_pi0.inputs.joints import compare_names
from lerobot_pi0.lerobot_compat import is_policy_joint
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, note, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

FOLLOWS, STRANGER = (
    0.9,
    0.5,
)  # correlations of an action with the state's joint of another and of its own name


def dataset_has_the_policys(inputs: Inputs) -> Iterator[Finding]:
    """The dataset's joints are those that the policy was trained on."""
    recorded = inputs.recorded
    columns = inputs.columns
    yield from _compare(
        inputs,
        "dataset",
        (recorded.state_feature_names, columns.state.shape[1]),
        (recorded.action_feature_names, columns.action.shape[1]),
    )


def robot_has_the_policys(inputs: Inputs) -> Iterator[Finding]:
    """The robot's joints, as lerobot-rollout hands them over, are those that the policy was trained on."""
    assert inputs.robot is not None
    # lerobot-rollout passes positions and velocities of the base on, nothing else.
    state, action = (
        [name for name, kind in features.items() if kind is float and is_policy_joint(name)]
        for features in (inputs.robot.observation_features, inputs.robot.action_features)
    )
    yield from _compare(inputs, "robot", (state, len(state)), (action, len(action)))


def _compare(
    inputs: Inputs, whose: str, state: tuple[list[str] | None, int], action: tuple[list[str] | None, int]
) -> Iterator[Finding]:
    config, fits = inputs.config, []
    for kind, trained, feature, (names, size) in (
        ("state", config.state_feature_names, config.robot_state_feature, state),
        ("action", config.action_feature_names, config.action_feature, action),
    ):
        expected = feature.shape[0] if feature else size
        if trained and names and trained != names:
            yield _difference(kind, whose, trained, names)
        elif size != expected:
            yield error(
                f"the {whose}'s {kind} has {size} dimensions, the policy's {expected}",
                f"{whose}: {listed(names, 8) if names else size}; policy: {listed(trained or [expected], 8)}",
                "use the robot and the dataset that the policy was trained with, or train on these",
            )
        elif not trained or not names:
            who = "policy" if not trained else whose
            yield note(
                f"the order of the {kind}'s joints cannot be checked: the {who} does not name them",
                f"{size} dimensions at both",
            )
        else:
            fits.append(f"{kind} ({listed(names, 3)})")
    if fits:
        yield fine(f"{whose}: the same {' and '.join(fits)}, in the same order")


def _difference(kind: str, whose: str, trained: Sequence[str], found: Sequence[str]) -> Finding:
    differ = compare_names(trained, found)
    evidence = f"policy: {listed(trained, 8)}; {whose}: {listed(found, 8)}"
    if differ.renamed:
        pairs = [f"{old} → {new}" for old, new in differ.renamed.items()]
        return warning(
            f"the {whose}'s {kind} names its joints differently: {listed(pairs)}",
            evidence,
            "if they are the same joints in the same units, rename them in the policy: "
            f"--policy.{kind}_feature_names='{json.dumps(list(found))}'; if not, train on this data",
        )
    faults = []
    if differ.missing:
        faults.append(f"lacks {listed(differ.missing)}")
    if differ.added:
        faults.append(f"has {listed(differ.added)} besides")
    if differ.permuted:
        faults.append("has its joints in another order")
    if not differ.missing and not differ.added:
        moved = [f"{a} gets {b}" for a, b in zip(trained, found, strict=True) if a != b]
        faults = [f"has its joints in another order: {listed(moved)}"]
    return error(
        f"the {whose}'s {kind} {' and '.join(faults)}",
        evidence,
        "use the robot (type and version) that the data was recorded with"
        if whose == "robot"
        else "use the dataset that the policy was trained on, or train on this one",
    )


def actions_follow_their_names(inputs: Inputs) -> Iterator[Finding]:
    """Each action moves the joint of its name and not another one: columns were not swapped in recording."""
    pair = inputs.pairing
    if not pair.by_name or not pair.smooth.any():
        return
    names = [name for name, smooth in zip(pair.names, pair.smooth, strict=True) if smooth]
    table = pair.table
    swapped = [
        f"'{names[i]}' moves '{names[j]}' ({table[i, j]:.2f}; its own joint {table[i, i]:.2f})"
        for i, j in enumerate(table.argmax(1))
        if i != j and table[i, j] > FOLLOWS and table[i, i] < STRANGER
    ]
    if swapped:
        yield error(
            "actions and states are not in the same order, although their names are",
            f"correlation of an action with the joints: {listed(swapped)}",
            "the recording mixed up columns: mend the names in meta/info.json or the order of the data, or "
            "record again",
        )
