"""The table of all checks, causes before symptoms, and the order of their findings."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lerobot_pi0.errors import UserError
from lerobot_pi0.tools.doctor import (
    behaviour,
    cameras,
    checkpoint,
    conventions,
    demonstrations,
    environment,
    joints,
    machine,
    motion,
    orientation,
    prompts,
    responses,
    scales,
    timing,
)
from lerobot_pi0.tools.doctor.finding import Finding, Severity, error
from lerobot_pi0.tools.doctor.inputs import UNREADABLE, Inputs

Look = Callable[[Inputs], Iterator[Finding]]


@dataclass(frozen=True)
class Check:
    """A check, the inputs that it needs, and the checks that have to pass before it is run."""

    area: str
    look: Look
    needs: tuple[str, ...]
    after: tuple[Look, ...] = ()

    @property
    def name(self) -> str:
        """As in the JSON: area.check."""
        return f"{self.area}.{self.look.__name__}"


SYMPTOMS = "policy"  # an area: what the policy does at the dataset's frames
P, D, R, E = ("policy",), ("dataset",), ("robot",), ("environment",)
PD, PR, DR, PE = P + D, P + R, D + R, P + E

_files, _loads = checkpoint.files_are_there, checkpoint.policy_loads
_whole = checkpoint.statistics_are_whole
_opens = environment.environment_opens
_here, _finite = motion.frames_are_here, motion.values_are_finite
# These have to pass before the policy can be run on the dataset.
_runs = (_files, _whole, _loads, _here, _finite, cameras.slots_are_filled, joints.dataset_has_the_policys)
_predicts = (*_runs, behaviour.actions_are_finite)

CHECKS = (
    Check("checkpoint", _files, P),
    Check("checkpoint", _whole, P, (_files,)),
    Check("checkpoint", checkpoint.state_is_in_the_prompt, P),
    Check("checkpoint", checkpoint.horizon_is_that_of_the_base, P),
    Check("checkpoint", checkpoint.weights_are_numbers, P),
    Check("checkpoint", checkpoint.weights_are_trained, P),
    Check("checkpoint", _loads, P, (_files,)),
    Check("cameras", cameras.features_fit, D),
    Check("cameras", cameras.cameras_are_rgb, D),
    Check("cameras", cameras.slots_are_filled, PD),
    Check("cameras", cameras.robot_fills_slots, PR),
    Check("cameras", cameras.slots_fit_names, P),
    Check("data", _here, D),
    Check("cameras", cameras.pictures_show_something, D, (_here,)),
    Check("cameras", cameras.pictures_differ, D, (_here,)),
    Check("cameras", cameras.pictures_change, D, (_here, cameras.pictures_show_something)),
    Check("cameras", cameras.dataset_shapes, PD, (cameras.slots_are_filled,)),
    Check("cameras", cameras.robot_shapes, PR, (cameras.robot_fills_slots,)),
    Check("cameras", cameras.squares_are_used, D),
    Check("joints", joints.dataset_has_the_policys, PD, (_here,)),
    Check("joints", joints.robot_has_the_policys, PR),
    Check("data", _finite, D, (_here,)),
    Check("joints", joints.actions_follow_their_names, D, (_here, _finite)),
    Check("data", motion.actions_are_no_copies, D, (_here, _finite)),
    Check(
        "data",
        motion.actions_come_before_movement,
        D,
        (_here, _finite, joints.actions_follow_their_names, motion.actions_are_no_copies),
    ),
    Check("data", motion.joints_move, D, (_here, _finite)),
    Check("data", motion.values_have_no_spikes, D, (_here, _finite)),
    Check("data", motion.actions_leave_their_limits, D, (_here, _finite)),
    Check("data", motion.episodes_are_no_waiting, D, (_here, _finite)),
    Check("demonstrations", demonstrations.grippers_change_before_the_end, D, (_here, _finite)),
    Check("demonstrations", demonstrations.pauses_show_when_they_end, D, (_here, _finite)),
    Check("demonstrations", demonstrations.same_states_get_the_same_actions, D, (_here, _finite)),
    Check("demonstrations", demonstrations.episodes_differ, D, (_here, _finite)),
    Check("environment", _opens, E),
    Check("environment", cameras.environment_fills_slots, PE, (_opens,)),
    Check("environment", cameras.environment_shapes, PE, (_opens, cameras.environment_fills_slots)),
    Check("environment", orientation.pictures_are_upright, PE, (_opens,)),
    Check("environment", conventions.state_is_the_policys, PE, (_opens, _files, _whole)),
    Check("environment", conventions.actions_are_the_policys, PE, (_opens, _files, _whole)),
    Check("environment", environment.environment_has_the_datas_rate, PE, (_opens,)),
    Check("environment", responses.gripper_has_the_datas_sign, PE, (_opens,)),
    Check(
        "environment",
        responses.environment_moves_as_recorded,
        PE,
        (
            _opens,
            conventions.state_is_the_policys,
            conventions.actions_are_the_policys,
            environment.environment_has_the_datas_rate,
            responses.gripper_has_the_datas_sign,
        ),
    ),
    Check("environment", environment.episodes_are_long_enough, PE, (_opens,)),
    Check("environment", environment.instructions_are_those_trained_on, PE, (_opens,)),
    Check("time", timing.frames_are_evenly_spaced, D, (_here,)),
    Check("time", timing.chunks_fit_episodes, D, (_here,)),
    Check("time", timing.cameras_keep_up, DR),
    Check("statistics", scales.pictures_have_statistics, D),
    Check("statistics", scales.recorded_statistics_are_the_datas, D, (_here, _finite)),
    Check("statistics", scales.actions_are_of_the_policys_kind, PD, _runs),
    Check("statistics", scales.policy_has_the_datas_statistics, PD, _runs),
    Check("prompts", prompts.prompts_say_something, D, (_here,)),
    Check("prompts", prompts.prompts_are_whole, D, (_files,)),
    Check("prompts", prompts.prompts_are_those_trained_on, PD),
    Check(SYMPTOMS, behaviour.actions_are_finite, PD, _runs),
    Check(SYMPTOMS, behaviour.actions_move, PD, _predicts),
    Check(SYMPTOMS, checkpoint.loss_is_below_baseline, PD, _predicts),
    Check(SYMPTOMS, behaviour.actions_stay_in_range, PD, _predicts),
    Check(SYMPTOMS, behaviour.actions_are_those_demonstrated, PD, _predicts),
    Check("machine", machine.device_is_here, P),
    Check("machine", machine.policy_fits, P),
)


@dataclass(frozen=True)
class Answer:
    """A finding, and the check that found it."""

    check: Check
    finding: Finding


def examine(inputs: Inputs, checks: Iterable[Check] = CHECKS) -> list[Answer]:
    """Run the checks whose inputs are given. The worst findings first, then in the order of the table.

    Symptoms follow causes of the same severity. A check that fails on damaged files is a finding too.
    """
    parts = {
        "policy": inputs.checkpoint,
        "dataset": inputs.metadata,
        "robot": inputs.robot,
        "environment": inputs.env,
    }
    answers, failed = [], set()
    for check in checks:
        if any(parts[part] is None for part in check.needs) or not failed.isdisjoint(check.after):
            continue
        try:
            found = list(check.look(inputs))
        except UNREADABLE as reason:
            found = [_broken(check, reason)]
        if any(finding.severity is Severity.ERROR for finding in found):
            failed.add(check.look)
        answers += [Answer(check, finding) for finding in found]
    return sorted(answers, key=_rank)


def _rank(answer: Answer) -> tuple[int, bool]:
    return list(Severity).index(answer.finding.severity), answer.check.area == SYMPTOMS


def _broken(check: Check, reason: Exception) -> Finding:
    return error(
        f"the check {check.name} could not run",
        str(reason) if isinstance(reason, UserError) else f"{type(reason).__name__}: {reason}",
        "mend the file that this names and run the doctor again",
    )
