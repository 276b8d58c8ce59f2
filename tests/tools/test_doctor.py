"""The doctor: a healthy policy, dataset and robot get a clean page, and whatever is broken is named first."""

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.cameras.opencv import OpenCVCameraConfig
from lerobot.configs import NormalizationMode
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.video_utils import FrameTimestampError
from lerobot.robots import Robot, RobotConfig
from lerobot.scripts import lerobot_edit_dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_policy import tiny_config

from lerobot_pi0 import cli
from lerobot_pi0.configuration_pi0 import Pi0Config, ReferenceState
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.dataset import DatasetFlags, fit_to
from lerobot_pi0.inputs.policy import PolicyFlags
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors
from lerobot_pi0.tools.columns import Columns
from lerobot_pi0.tools.doctor import (
    behaviour,
    cameras,
    checkpoint,
    command,
    joints,
    machine,
    motion,
    prompts,
    scales,
)
from lerobot_pi0.tools.doctor.checks import CHECKS, SYMPTOMS, Answer, examine
from lerobot_pi0.tools.doctor.command import DoctorConfig
from lerobot_pi0.tools.doctor.finding import Severity
from lerobot_pi0.tools.doctor.inputs import Inputs
from lerobot_pi0.tools.doctor.page import page
from lerobot_pi0.tools.memory import MemoryEstimate, estimate_memory
from lerobot_pi0.tools.pairing import FRAMES

pytestmark = pytest.mark.slow

JOINTS = ["shoulder.pos", "elbow.pos", "gripper.pos"]
TASKS = {"Reach to the left": -40.0, "Reach to the right": 50.0}
EPISODES, LENGTH, FPS = 8, 60, 15
HEIGHT, WIDTH = 48, 64
STEPS = 200
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
STATE, ACTION = "observation.state", "action"
WEIGHTS, PREPROCESSOR = "model.safetensors", "policy_preprocessor.json"


@dataclass
class Case:
    """A dataset and a checkpoint of one's own to damage, and the robot."""

    dataset: Path
    checkpoint: Path
    robot: Robot | None = None

    def examine(self, policy: bool = True, dataset: bool = True) -> tuple[Inputs, list[Answer]]:
        inputs = Inputs(
            PolicyFlags(str(self.checkpoint)) if policy else None,
            DatasetFlags("local/arm", self.dataset) if dataset else None,
            self.robot,
        )
        return inputs, examine(inputs)


def camera(height: int = HEIGHT, fps: int = FPS) -> OpenCVCameraConfig:
    return OpenCVCameraConfig(index_or_path=0, width=WIDTH, height=height, fps=fps)


@RobotConfig.register_subclass("doctors_arm")
@dataclass(kw_only=True)
class DoctorsArmConfig(RobotConfig):
    joints: list[str] = field(default_factory=lambda: list(JOINTS))
    cameras: dict[str, OpenCVCameraConfig] = field(
        default_factory=lambda: {"front": camera(), "wrist": camera()}
    )


class DoctorsArm(Robot):
    """An arm that cannot be connected to."""

    config_class, name = DoctorsArmConfig, "doctors_arm"

    def __init__(self, config: DoctorsArmConfig):
        self.config = config

    @property
    def observation_features(self) -> dict[str, Any]:
        cameras = self.config.cameras
        return self.action_features | {name: (of.height, of.width, 3) for name, of in cameras.items()}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(self.config.joints, float)

    is_connected = is_calibrated = False

    def connect(self, calibrate: bool = True) -> Any:
        raise AssertionError("a doctor connects to nothing")

    def send_action(self, action: Any) -> Any:
        self.connect()

    def calibrate(self) -> Any:
        self.connect()

    configure = get_observation = disconnect = calibrate


def arm(**changes: Any) -> Robot:
    return DoctorsArm(DoctorsArmConfig(**changes))


# A healthy dataset, and a policy that learned it.


def record(root: Path, episodes: int = EPISODES, length: int = LENGTH) -> Path:
    """An arm that reaches for what it was told; two cameras show where it is."""
    features = {
        key: {"dtype": "image", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
        for key in (FRONT, WRIST)
    } | {key: {"dtype": "float32", "shape": (len(JOINTS),), "names": JOINTS} for key in (STATE, ACTION)}
    dataset = LeRobotDataset.create("local/arm", fps=FPS, features=features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    tasks = list(TASKS.items())
    for episode in range(episodes):
        task, target = tasks[episode % 2]
        start = random.uniform(-10, 10, 2)
        phase = np.linspace(0, 1, length + 1)[:, None]
        ease = 0.5 - 0.5 * np.cos(np.pi * phase)
        path = np.hstack((start + (np.array([target, 30.0]) - start) * ease, 80 - 70 * phase))
        path = path.astype(np.float32)
        for now, ahead in pairwise(path):
            images = {FRONT: picture(now[0], 20), WRIST: picture(now[2], 60)}
            dataset.add_frame(images | {STATE: now, ACTION: ahead, "task": task})
        dataset.save_episode()
    dataset.finalize()
    return root


def picture(position: float, shade: int) -> np.ndarray:
    """A bright block where the joint is, on a background that is not flat."""
    image = np.full((HEIGHT, WIDTH, 3), shade, np.uint8)
    image[:, ::7] += 30
    left = int((position + 60) / 150 * (WIDTH - 16))
    image[12:36, left : left + 16] = (230, 160, 90)
    return image


def train(root: Path, folder: Path) -> Path:
    """A tiny policy, overfitted."""
    torch.manual_seed(0)
    config = tiny_config(input_features={}, output_features={}, augmentation=False, ema_decay=0.0)
    dataset = LeRobotDataset("local/arm", root, delta_timestamps={ACTION: [i / FPS for i in range(6)]})
    fit_to(config, dataset.meta)
    config.set_dataset_feature_metadata(dataset.meta.features)
    policy = Pi0Policy(config, dataset.meta.stats, dataset.meta)
    pipelines = make_lerobot_pi0_pre_post_processors(config, dataset.meta.stats)
    rows = [dataset[i] for i in range(0, len(dataset), 3)]
    everything = pipelines[0](torch.utils.data.default_collate(rows))
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=2e-3)
    policy.train()
    for _ in range(STEPS):
        chosen = torch.randint(len(rows), (32,))
        batch = {k: v[chosen] for k, v in everything.items() if isinstance(v, torch.Tensor)}
        loss, _ = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval().save_pretrained(folder)
    for pipeline in pipelines:
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def healthy(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("healthy")
    root = record(folder / "dataset")
    return Case(root, train(root, folder / "checkpoint"))


@pytest.fixture
def case(healthy, tmp_path) -> Case:
    return Case(
        shutil.copytree(healthy.dataset, tmp_path / "dataset"),
        shutil.copytree(healthy.checkpoint, tmp_path / "checkpoint"),
    )


@pytest.fixture(autouse=True, scope="module")
def memory_estimated_once():
    """All of these policies have the same size, and counting takes as long as all other checks."""
    with pytest.MonkeyPatch.context() as patch:
        counted: list[MemoryEstimate] = []

        def count(config: Pi0Config, device: Any) -> MemoryEstimate:
            if not counted:
                counted.append(estimate_memory(config, device=device))
            return counted[0]

        patch.setattr(machine, "estimate_memory", count)
        yield


# Instruments.


def columns(case: Case, change: Callable[[dict[str, np.ndarray]], object], statistics: bool = True) -> None:
    """Change state, action and the like of all frames; the dataset's statistics follow, if they are to."""
    (file,) = case.dataset.glob("data/*/*.parquet")
    table = pq.read_table(file)
    plain = [STATE, ACTION, "timestamp", "frame_index", "task_index"]
    values = {name: np.array(table[name].to_pylist()) for name in plain}
    change(values)
    for name in plain:
        place = table.schema.get_field_index(name)
        column = pa.array(values[name].tolist(), type=table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), column)
    pq.write_table(table, file)
    if statistics:
        stats = json.loads((case.dataset / "meta/stats.json").read_text())
        for key in (STATE, ACTION):
            found = {name: getattr(np, name)(values[key], axis=0) for name in ("mean", "std", "min", "max")}
            stats[key] |= {name: value.tolist() for name, value in found.items()}
        (case.dataset / "meta/stats.json").write_text(json.dumps(stats))


def pictures(case: Case, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the pictures (frames, height, width, 3) of each camera, in size too."""
    (file,) = case.dataset.glob("data/*/*.parquet")
    table = pq.read_table(file)
    images = {
        key: np.stack([np.array(Image.open(io.BytesIO(cell["bytes"]))) for cell in table[key].to_pylist()])
        for key in (FRONT, WRIST)
    }
    change(images)
    info = json.loads((case.dataset / "meta/info.json").read_text())
    for key, frames in images.items():
        cells = []
        for frame in frames:
            Image.fromarray(frame).save(buffer := io.BytesIO(), "png")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        place = table.schema.get_field_index(key)
        field_ = table.schema.field(key)
        table = table.set_column(place, field_, pa.array(cells, type=field_.type))
        info["features"][key]["shape"] = list(frames.shape[1:])
    pq.write_table(table.replace_schema_metadata(None), file)
    (case.dataset / "meta/info.json").write_text(json.dumps(info))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def info(case: Case, change: Callable[[dict[str, Any]], object]) -> None:
    edit(case.dataset / "meta/info.json", change)


def names(case: Case, **given: list[str]) -> None:
    keys = {"state": STATE, "action": ACTION}
    for kind, value in given.items():
        info(case, lambda content: content["features"][keys[kind]].update(names=value))  # noqa: B023


def weights(case: Case, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(case.checkpoint / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, case.checkpoint / WEIGHTS)


def tasks(case: Case, texts: list[str]) -> None:
    table = pd.DataFrame({"task_index": range(len(texts))}, index=pd.Index(texts, name="task"))
    table.to_parquet(case.dataset / "meta/tasks.parquet")


def random_weights(case: Case) -> None:
    config = Pi0Config.from_pretrained(case.checkpoint)
    assert isinstance(config, Pi0Config)
    Pi0Policy(config).save_pretrained(case.checkpoint)


# Faults: what is done to a healthy case, and the check that has to name it first.

FAULTS: dict[str, tuple[str, Callable[[Case], Any]]] = {}


def fault(check: str) -> Callable[[Callable[[Case], Any]], Callable[[Case], Any]]:
    def enter(damage: Callable[[Case], Any]) -> Callable[[Case], Any]:
        FAULTS[damage.__name__] = (check, damage)
        return damage

    return enter


@fault("checkpoint.files_are_there")
def no_tokenizer(case):
    next(case.checkpoint.glob("*tokenizer.safetensors")).unlink()


@fault("checkpoint.files_are_there")
def no_preprocessor(case):
    (case.checkpoint / PREPROCESSOR).unlink()


@fault("checkpoint.statistics_are_whole")
def processors_of_two_checkpoints(case):
    (file,) = case.checkpoint.glob("policy_postprocessor_*unnormalizer*.safetensors")
    save_file({name: value * 2 for name, value in load_file(file).items()}, file)


@fault("checkpoint.statistics_are_whole")
def statistics_of_another_robot(case):
    for file in case.checkpoint.glob("policy_p*normalizer*.safetensors"):
        cut = {name: value[:2] if value.ndim == 1 else value for name, value in load_file(file).items()}
        save_file(cut, file)


@fault("checkpoint.statistics_are_whole")
def statistics_of_another_robot_after_the_policy(case):
    (file,) = case.checkpoint.glob("policy_postprocessor_*unnormalizer*.safetensors")
    cut = {name: value[:2] if value.ndim == 1 else value for name, value in load_file(file).items()}
    save_file(cut, file)


@fault("checkpoint.weights_are_numbers")
def a_weight_is_nan(case):
    weights(case, lambda tensors: tensors["model.action_in_proj.weight"][0, 0].fill_(torch.nan))


@fault("checkpoint.weights_are_trained")
def weights_are_random(case):
    random_weights(case)


@fault("checkpoint.weights_are_trained")
def nothing_reaches_the_actions(case):
    weights(case, lambda tensors: tensors["model.action_out_proj.weight"].zero_())


@fault("checkpoint.policy_loads")
def a_tensor_is_missing(case):
    weights(case, lambda tensors: tensors.pop("model.state_proj.weight"))


@fault("cameras.slots_are_filled")
def a_camera_is_called_otherwise(case):
    (file,) = case.dataset.glob("data/*/*.parquet")
    table = pq.read_table(file)
    other = [name.replace("front", "top") for name in table.column_names]
    pq.write_table(table.rename_columns(other).replace_schema_metadata(None), file)
    top = FRONT.replace("front", "top")
    info(case, lambda content: content["features"].update({top: content["features"].pop(FRONT)}))


@fault("cameras.features_fit")
def no_camera_was_recorded(case):
    (file,) = case.dataset.glob("data/*/*.parquet")
    pq.write_table(pq.read_table(file).drop_columns([FRONT, WRIST]).replace_schema_metadata(None), file)
    info(case, lambda content: [content["features"].pop(key) for key in (FRONT, WRIST)])


@fault("cameras.cameras_are_rgb")
def a_camera_has_an_alpha_channel(case):
    info(case, lambda content: content["features"][WRIST].update(shape=[HEIGHT, WIDTH, 4]))


@fault("statistics.pictures_have_statistics")
def pictures_without_statistics(case):
    edit(case.dataset / "meta/stats.json", lambda stats: stats.pop(FRONT))


@fault("cameras.robot_fills_slots")
def the_robot_has_one_camera(case):
    case.robot = arm(cameras={"front": camera()})


@fault("cameras.robot_shapes")
def the_robots_picture_is_wide(case):
    case.robot = arm(cameras={"front": camera(height=36), "wrist": camera()})


@fault("cameras.slots_fit_names")
def the_wrist_camera_is_the_base(case):
    swapped = {"base": WRIST, "left_wrist": FRONT}
    edit(case.checkpoint / "config.json", lambda content: content.update(cameras=swapped))


@fault("cameras.pictures_show_something")
def a_lens_cap(case):
    pictures(case, lambda images: images[FRONT].fill(2))


@fault("cameras.pictures_change")
def a_frozen_camera(case):
    pictures(case, lambda images: np.copyto(images[FRONT], images[FRONT][0]))


@fault("cameras.pictures_differ")
def two_names_for_one_camera(case):
    pictures(case, lambda images: images.update({WRIST: images[FRONT]}))


@fault("cameras.dataset_shapes")
def another_shape_of_picture(case):
    pictures(case, lambda images: images.update({FRONT: images[FRONT][:, :30]}))


@fault("joints.dataset_has_the_policys")
def joints_in_another_order(case):
    names(case, state=JOINTS[::-1], action=JOINTS[::-1])
    columns(case, lambda values: values.update({key: values[key][:, ::-1] for key in (STATE, ACTION)}))


@fault("joints.dataset_has_the_policys")
def joints_with_other_names(case):
    names(case, state=["pan.pos", *JOINTS[1:]], action=["pan.pos", *JOINTS[1:]])


@fault("joints.robot_has_the_policys")
def a_robot_with_joints_in_another_order(case):
    case.robot = arm(joints=[JOINTS[1], JOINTS[0], JOINTS[2]])


@fault("joints.robot_has_the_policys")
def a_robot_with_joints_in_another_order_and_other_names(case):
    case.robot = arm(joints=[JOINTS[1], JOINTS[0], "jaw.pos"])


@fault("joints.robot_has_the_policys")
def a_robot_without_gripper(case):
    case.robot = arm(joints=JOINTS[:2])


@fault("joints.actions_follow_their_names")
def columns_are_swapped_in_the_actions(case):
    columns(case, lambda values: values.update({ACTION: values[ACTION][:, [2, 1, 0]]}))


@fault("data.values_are_finite")
def a_state_is_nan(case):
    columns(case, lambda values: values[STATE][70].fill(np.nan), statistics=False)


@fault("data.actions_are_no_copies")
def actions_repeat_the_state(case):
    columns(case, lambda values: values.update({ACTION: values[STATE]}))


@fault("data.actions_come_before_movement")
def actions_are_late(case):
    def change(values):
        rows = np.arange(len(values[ACTION]))
        values[ACTION] = values[ACTION][np.maximum(rows - 4, rows // LENGTH * LENGTH)]

    columns(case, change)


@fault("data.joints_move")
def the_gripper_never_moves(case):
    def change(values):
        values[STATE][:, 2] = values[ACTION][:, 2] = 50

    columns(case, change)


@fault("data.joints_move")
def the_leaders_elbow_is_unplugged(case):
    def change(values):
        values[ACTION][:, 1] = 10

    columns(case, change)


@fault("data.values_have_no_spikes")
def one_action_jumps(case):
    columns(case, lambda values: values[ACTION].__setitem__((200, 1), 300))


@fault("data.values_have_no_spikes")
def a_joint_that_rests_has_one_glitch(case):
    def change(values):
        values[STATE][:, 2] = values[ACTION][:, 2] = 50
        values[STATE][200, 2] = values[ACTION][200, 2] = 300

    columns(case, change)


@fault("data.actions_leave_their_limits")
def the_leader_is_at_its_limit(case):
    columns(case, lambda values: values[ACTION][:, 0].clip(max=5, out=values[ACTION][:, 0]))


@fault("data.episodes_are_no_waiting")
def episodes_begin_with_a_pause(case):
    def change(values):
        first = np.arange(len(values[STATE])) // LENGTH * LENGTH
        late = np.maximum(np.arange(len(first)) % LENGTH - 25, 0)
        for key in (STATE, ACTION):
            values[key] = values[key][first + late]

    columns(case, change)


@fault("data.episodes_are_no_waiting")
def a_pause_and_a_joint_that_is_noise(case):
    episodes_begin_with_a_pause(case)

    def change(values):
        noise = np.random.default_rng(0).normal(50, 0.05, len(values[STATE])).astype(np.float32)
        values[STATE][:, 1], values[ACTION][:, 1] = noise, noise

    columns(case, change)


@fault("time.frames_are_evenly_spaced")
def another_fps(case):
    info(case, lambda content: content.update(fps=30))


@fault("time.frames_are_evenly_spaced")
def frames_are_missing(case):
    def change(values):
        values["frame_index"] += values["frame_index"] > 20

    columns(case, change)


@fault("data.frames_are_here")
def an_interrupted_edit(case):
    info(case, lambda content: content.update(total_frames=400))


@fault("time.cameras_keep_up")
def a_slow_camera(case):
    case.robot = arm(cameras={"front": camera(fps=5), "wrist": camera()})


@fault("statistics.recorded_statistics_are_the_datas")
def statistics_of_an_older_version(case):
    edit(case.dataset / "meta/stats.json", lambda stats: stats[ACTION].update(mean=[9.0, 9.0, 9.0]))


@fault("statistics.actions_are_of_the_policys_kind")
def the_datas_actions_are_relative(case):
    columns(case, lambda values: values.update({ACTION: values[ACTION] - values[STATE]}))


@fault("statistics.policy_has_the_datas_statistics")
def radians_for_degrees(case):
    columns(case, lambda values: values.update({key: np.radians(values[key]) for key in (STATE, ACTION)}))


@fault("statistics.policy_has_the_datas_statistics")
def a_robot_with_another_zero(case):
    columns(case, lambda values: values.update({key: values[key] + 180 for key in (STATE, ACTION)}))


@fault("prompts.prompts_say_something")
def an_empty_instruction(case):
    tasks(case, ["", "Reach to the right"])


@fault("prompts.prompts_say_something")
def one_instruction_in_two_spellings(case):
    tasks(case, ["Reach to the right.", "reach_to_the_right"])


@fault("prompts.prompts_are_whole")
def prompts_are_cut(case):
    edit(case.checkpoint / PREPROCESSOR, lambda file: file["steps"][2]["config"].update(max_length=4))


@fault("prompts.prompts_are_those_trained_on")
def instructions_that_were_never_trained(case):
    trained = case.dataset.with_name("trained")
    (trained / "meta").mkdir(parents=True)
    shutil.copy(case.dataset / "meta/tasks.parquet", trained / "meta")
    content = {"dataset": {"repo_id": "local/trained", "root": str(trained)}}
    (case.checkpoint / "train_config.json").write_text(json.dumps(content))
    tasks(case, ["Reach to the left", "Go right"])


@fault("policy.loss_is_below_baseline")
def hardly_trained(case):
    random_weights(case)
    weights(case, lambda tensors: [t.add_(1e-3) for name, t in tensors.items() if "norm.weight" in name])


def test_on_the_dataset_that_it_was_trained_on_the_cure_is_more_training(case):
    hardly_trained(case)
    content = {"dataset": {"repo_id": "local/data", "root": str(case.dataset)}}
    (case.checkpoint / "train_config.json").write_text(json.dumps(content))
    _, answers = case.examine()
    fixes = {answer.check.name: answer.finding.fix for answer in answers}
    assert "train for more steps" in fixes["policy.loss_is_below_baseline"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_first(case, name):
    check, damage = FAULTS[name]
    damage(case)
    inputs, answers = case.examine()
    # A cause that is a warning follows its symptoms that are errors.
    of_area = [of for of in answers if (of.check.area == SYMPTOMS) == check.startswith(SYMPTOMS)]
    first = of_area[0]
    assert first.check.name == check, page(inputs, answers)
    assert first.finding.severity in (Severity.ERROR, Severity.WARNING)
    assert first.finding.evidence
    assert first.finding.fix


def test_episodes_that_wait_are_named(case):
    episodes_begin_with_a_pause(case)
    _, answers = case.examine()
    found = [of.finding for of in answers if of.check.name == "data.episodes_are_no_waiting"]
    begins = next(finding for finding in found if "begin with a pause" in finding.what)
    assert "for more than 1 s in episodes 0, 1, 2" in begins.evidence


@pytest.mark.parametrize(
    ("policy", "dataset", "robot"),
    [(True, True, True), (True, False, False), (False, True, False), (True, False, True)],
)
def test_what_is_healthy_gets_a_clean_page(healthy, policy, dataset, robot):
    case = Case(healthy.dataset, healthy.checkpoint, arm() if robot else None)
    inputs, answers = case.examine(policy, dataset)
    assert {answer.finding.severity for answer in answers} == {Severity.FINE}, page(inputs, answers)


def test_only_joints_in_their_places_may_be_called_otherwise(case):
    """The fix for other names, pasted where joints were swapped, would move each by another's actions."""
    for names_, fix in (
        ([*JOINTS[:2], "jaw.pos"], True),
        ([JOINTS[1], JOINTS[0], "jaw.pos"], False),
        (["jaw.pos", *JOINTS[:2]], False),
    ):
        case.robot = arm(joints=names_)
        _, answers = case.examine()
        assert ("--policy.state_feature_names" in answers[0].finding.fix) is fix
        assert (answers[0].finding.severity is Severity.WARNING) is fix


@pytest.mark.parametrize("does", ["nothing", "the same everywhere"])
def test_a_policy_that_does_not_move_is_named(healthy, does):
    inputs = Inputs(PolicyFlags(str(healthy.checkpoint)), DatasetFlags("local/arm", healthy.dataset), None)
    chunk, average = inputs.trial.demonstrated, inputs.columns.action.mean(0)
    still = inputs.trial.state[:, None] if does == "nothing" else average
    inputs.__dict__["trial"] = replace(inputs.trial, predicted=np.broadcast_to(still, chunk.shape))
    answers = examine(inputs)
    assert answers[0].check.name == "policy.actions_move", page(inputs, answers)


def inputs_of(case: Case, **given: Any) -> Inputs:
    """A case's inputs, some parts of which are given instead of read."""
    inputs = Inputs(PolicyFlags(str(case.checkpoint)), DatasetFlags("local/arm", case.dataset), None)
    inputs.__dict__.update(given)
    return inputs


def test_a_joint_that_moves_in_one_of_two_tasks_moves(healthy):
    """Also where the dataset has so many frames that a sample of episodes is looked at."""
    once = inputs_of(healthy).columns
    times = 2 * FRAMES // len(once.episode)
    repeated = {of.name: np.concatenate([getattr(once, of.name)] * times) for of in fields(Columns)}
    repeated["episode"] = np.repeat(np.arange(EPISODES * times), LENGTH)
    for values in (repeated["state"], repeated["action"]):
        values[repeated["episode"] % 2 == 0, 2] = 80
    many = inputs_of(healthy, columns=Columns(**repeated))
    assert len(many.pairing.episode) < len(many.columns.episode)
    assert set(many.pairing.episode % 2) == {0, 1}, "both tasks"
    assert not list(motion.joints_move(many))
    for values in (repeated["state"], repeated["action"]):
        values[many.columns.episode != 1, 2] = 80
    assert not list(motion.joints_move(inputs_of(healthy, columns=Columns(**repeated))))


def test_relative_joints_need_no_names(healthy):
    """A converted checkpoint names its joints by numbers alone."""
    config = replace(
        Pi0Config.from_pretrained(healthy.checkpoint),
        relative_actions=True,
        reference_state=ReferenceState([0, 1], [0, 1], [1.0, 1.0], [0.0, 0.0]),
        action_feature_names=None,
        state_feature_names=None,
    )
    inputs = inputs_of(healthy, checkpoint=(config, healthy.checkpoint))
    (found,) = scales.policy_has_the_datas_statistics(inputs)
    relative = inputs.columns.action[0, 0] - inputs.columns.state[0, 0]
    assert abs(relative) < 1
    assert "shoulder.pos: " in found.evidence, "absolute statistics, and the data's are relative"


def test_episodes_of_two_frames_have_no_pairing(healthy):
    whole = inputs_of(healthy).columns
    short = Columns(**{of.name: getattr(whole, of.name)[:2] for of in fields(Columns)})
    assert not list(joints.actions_follow_their_names(inputs_of(healthy, columns=short)))


def test_a_switch_at_the_end_of_each_episode_is_no_glitch(healthy):
    once = inputs_of(healthy).columns
    values = once.action.copy()
    values[:, 2] = 0
    values[[LENGTH - 1, 2 * LENGTH - 1], 2] = 1
    switched = inputs_of(healthy, columns=replace(once, action=values))
    assert not list(motion.values_have_no_spikes(switched))


def test_averaged_quantiles_are_not_called_stale(healthy):
    """LeRobot averages quantiles over episodes: another recompute_stats would change nothing."""
    modes = dict.fromkeys(("STATE", "ACTION"), NormalizationMode.QUANTILES)
    quantiles = inputs_of(healthy, config=Pi0Config(device="cpu", normalization_mapping=modes))
    (found,) = scales.recorded_statistics_are_the_datas(quantiles)
    assert found.severity is Severity.WARNING
    assert "averages" in found.what
    assert "--policy.normalization_mapping" in found.fix
    assert "--operation" not in found.fix


def test_the_cure_for_stale_statistics_cures_them_where_they_are(case, monkeypatch):
    statistics_of_an_older_version(case)
    (found,) = scales.recorded_statistics_are_the_datas(inputs_of(case))
    monkeypatch.setattr("sys.argv", found.fix.split())
    lerobot_edit_dataset.main()
    (found,) = scales.recorded_statistics_are_the_datas(inputs_of(case))
    assert found.severity is Severity.FINE


def test_pictures_are_called_light_and_moving_where_they_are(healthy, case):
    assert [of.severity for of in cameras.pictures_change(inputs_of(healthy))] == [Severity.FINE]
    a_lens_cap(case)
    _, answers = case.examine(policy=False)
    assert not any("light" in answer.finding.what for answer in answers)


@pytest.mark.parametrize("cut", [False, True])
def test_only_what_is_cut_is_the_same_because_it_is_cut(case, cut):
    long = " ".join(["Reach"] * 60)
    tasks(case, ["pick_up the cube", "pick up the cube", long + " left", long + " right" if cut else "Go"])
    (found,) = prompts.prompts_are_whole(inputs_of(case))
    assert ("because they are cut" in found.what) is cut
    assert found.what.startswith("2 instructions" if cut else "1 of 4")
    assert "cube" not in found.evidence
    (found, *_) = prompts.prompts_say_something(inputs_of(case))
    assert "reads alike" in found.what


def test_prompts_are_measured_before_there_is_a_policy_where_the_tokenizer_is_here(case, monkeypatch):
    small = files("lerobot_pi0").joinpath("tokenizers", "small.json")
    monkeypatch.setattr(prompts, "try_to_load_from_cache", lambda *_: str(small))
    tasks(case, ["Reach to the left", " ".join(["Reach"] * 60)])
    _, answers = case.examine(policy=False)
    assert answers[0].check.name == "prompts.prompts_are_whole"


def test_steps_beyond_an_episodes_end_are_not_judged(healthy):
    trial = inputs_of(healthy).trial
    chunks, real = trial.demonstrated.copy(), trial.real.copy()
    chunks[:, -3:] = 1e3
    real[:, -3:] = False
    for judged, findings in ((trial.real, 1), (real, 0)):
        inputs = inputs_of(healthy, trial=replace(trial, predicted=chunks, real=judged))
        assert len(list(behaviour.actions_stay_in_range(inputs))) == findings


def test_predictions_that_are_not_finite_get_no_other_verdict(healthy):
    trial = inputs_of(healthy).trial
    inputs = inputs_of(healthy, trial=replace(trial, predicted=np.full_like(trial.predicted, np.nan)))
    found = [answer.check.name for answer in examine(inputs) if answer.check.area == SYMPTOMS]
    assert found == ["policy.actions_are_finite"]


def cut(file: str) -> Callable[[Case], object]:
    def damage(case: Case) -> None:
        (path,) = case.dataset.glob(file)
        path.write_bytes(path.read_bytes()[:50])

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut("meta/info.json"), r"meta/info\.json is damaged"),
        (cut("meta/stats.json"), r"meta/stats\.json is damaged"),
        (cut("meta/tasks.parquet"), r"meta/tasks\.parquet cannot be read"),
        (cut("data/*/*.parquet"), r"data/.*\.parquet cannot be read"),
        (
            lambda case: info(case, lambda content: content["features"][FRONT].update(names=None)),
            "does not name its axes",
        ),
        (lambda case: (case.checkpoint / PREPROCESSOR).write_text("[]"), f"{PREPROCESSOR} holds list"),
    ],
)
def test_damaged_files_are_named(case, damage, named):
    damage(case)
    try:
        text = page(*case.examine())
    except UserError as error:
        text = str(error)
    assert re.search(named, " ".join(text.split())), text


def test_actions_that_never_move_get_no_verdict_on_the_loss(case):
    columns(case, lambda values: values.update({ACTION: np.ones_like(values[ACTION])}))
    _, answers = case.examine()
    assert not {"policy.loss_is_below_baseline", "policy.actions_move"} & {of.check.name for of in answers}


def test_symptoms_come_after_their_cause(case):
    weights(case, lambda tensors: tensors["model.action_out_proj.weight"].mul_(-3))
    inputs, answers = case.examine()
    found = {answer.check.name for answer in answers if answer.finding.severity is not Severity.FINE}
    symptoms = {"policy.loss_is_below_baseline", "policy.actions_stay_in_range"}
    assert found >= symptoms | {"policy.actions_are_those_demonstrated"}, page(inputs, answers)
    one_instruction_in_two_spellings(case)  # a warning
    inputs, answers = case.examine()
    order = list(Severity)
    found = [order.index(answer.finding.severity) for answer in answers]
    assert found == sorted(found), page(inputs, answers)
    assert "prompts.prompts_say_something" in {answer.check.name for answer in answers}


def test_a_new_policy_on_short_episodes_or_wide_pictures(case, tmp_path):
    short = Case(record(tmp_path / "short", episodes=2, length=30), case.checkpoint)
    inputs, answers = short.examine(policy=False)
    assert answers[0].check.name == "time.chunks_fit_episodes", page(inputs, answers)
    flags = re.findall(r"--policy\.(\w+)=(\d+)", answers[0].finding.fix)
    settings: Any = {name: int(value) for name, value in flags}
    Pi0Config(device="cpu", **settings)  # which takes them together
    pictures(case, lambda images: images.update({key: frames[:, :20] for key, frames in images.items()}))
    inputs, answers = case.examine(policy=False)
    assert answers[0].check.name == "cameras.squares_are_used", page(inputs, answers)


def test_every_check_has_a_fault():
    """A check that nobody has seen fail is not trusted. Two of them need a machine that is not here."""
    shown = {check for check, _ in FAULTS.values()} | {
        "policy.actions_are_finite",
        "policy.actions_move",
        "policy.actions_stay_in_range",
        "policy.actions_are_those_demonstrated",
        "time.chunks_fit_episodes",
        "cameras.squares_are_used",
    }
    elsewhere = ("demonstrations", "environment")  # areas with a module of tests each
    assert {check.name for check in CHECKS if check.area not in elsewhere} - shown == {
        "checkpoint.horizon_is_that_of_the_base",  # of π0.5, as the next
        "checkpoint.state_is_in_the_prompt",
        "machine.device_is_here",
        "machine.policy_fits",
    }


def truncated(*_: Any) -> None:
    raise FrameTimestampError("cut off")


def test_without_cameras_there_is_no_contact_sheet(case, tmp_path):
    no_camera_was_recorded(case)
    with pytest.raises(ValueError, match="no camera"):
        cameras.contact_sheet(inputs_of(case), tmp_path / "cameras.png")


def test_the_command_prints_a_page_or_json_and_exits_by_it(healthy, case, tmp_path, monkeypatch, capsys):
    def call(of: Case, *flags: str) -> tuple[int, str]:
        monkeypatch.setattr(
            "sys.argv",
            [
                *["lerobot-pi0", "doctor"],
                f"--policy.path={of.checkpoint}",
                f"--dataset.root={of.dataset}",
                *flags,
            ],
        )
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().out

    code, text = call(healthy, f"--output={tmp_path}/out", "--robot.type=doctors_arm")
    assert code == 0
    assert "Nothing is wrong." in text
    assert (tmp_path / "out/page.txt").read_text() in text + "\n"
    assert Image.open(tmp_path / "out/cameras.png").size == (4 * 160, 2 * 176)
    monkeypatch.setattr(command, "contact_sheet", truncated)
    code, text = call(healthy, f"--output={tmp_path}/cut")
    assert code == 0
    assert "cameras.png could not be made: cut off" in (tmp_path / "cut/page.txt").read_text()
    assert f"In {tmp_path}/cut: page.txt" in text
    with pytest.raises(ValueError, match=r"--dataset.episodes=\[999\], but .* episodes 0 to 7"):
        command.main(DoctorConfig(dataset=DatasetFlags("local/arm", healthy.dataset, episodes=[999])))
    a_frozen_camera(case)
    code, text = call(case, "--json")
    assert code == 1
    found = json.loads(text)["findings"][0]
    assert (found["check"], found["severity"]) == ("cameras.pictures_change", "error")


@pytest.mark.parametrize(
    ("changes", "severity", "text"),
    [
        ({}, "fine", "the state is in the prompt, normalized by QUANTILES"),
        ({"state_in_prompt": False}, "note", "does not see the state"),
        ({"normalization_mapping": {"STATE": NormalizationMode.MEAN_STD}}, "warning", "far from their mean"),
        ({"normalization_mapping": {"STATE": NormalizationMode.IDENTITY}}, "warning", "as it is"),
    ],
)
def test_the_state_of_pi05_is_looked_for_in_the_prompt(changes, severity, text):
    inputs: Any = SimpleNamespace(config=tiny_config("pi05", **changes))
    (found,) = checkpoint.state_is_in_the_prompt(inputs)
    assert (found.severity, text in found.what) == (severity, True)
    inputs.config = tiny_config()
    assert not list(checkpoint.state_is_in_the_prompt(inputs))


@pytest.mark.parametrize("tiny", ["pi05"], indirect=True)
def test_an_untrained_policy_of_pi05_is_diagnosed_like_any(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "doctor", *tiny, "--json"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    findings = json.loads(capsys.readouterr().out)["findings"]
    found = {finding["check"]: finding["severity"] for finding in findings}
    assert found["policy.loss_is_below_baseline"] == "error"
    assert found["policy.actions_are_those_demonstrated"] == "warning"
    assert found["checkpoint.state_is_in_the_prompt"] == "fine"


def test_another_horizon_than_that_of_published_weights_is_noted():
    inputs: Any = SimpleNamespace(config=tiny_config("pi05", base_checkpoint="lerobot/pi05_droid"))
    (found,) = checkpoint.horizon_is_that_of_the_base(inputs)
    assert "chunks have 6 actions, those of 'lerobot/pi05_droid' 15" in found.what
    for same in (
        tiny_config("pi05", chunk_size=15, base_checkpoint="lerobot/pi05_droid"),
        tiny_config("pi05"),
    ):
        inputs.config = same
        assert not list(checkpoint.horizon_is_that_of_the_base(inputs))
