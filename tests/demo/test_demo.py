"""The demo's steps: their command lines, and how a second start tells what is done."""

import json
import os
import sys
from pathlib import Path

import draccus
import pytest
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.train import TrainPipelineConfig

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.demo.command import Job
from lerobot_pi0.demo.demo import Demo, DemoConfig, minutes_left
from lerobot_pi0.demo.environment import MetaworldFastEnvConfig
from lerobot_pi0.demo.record import SETTINGS_FILE, RecordConfig
from lerobot_pi0.demo.suites import EVALUATION_SEED
from lerobot_pi0.inputs.shipped_configs import shipped_config

PAIR = ["window-open-v3", "window-close-v3"]


@pytest.fixture
def demo(tmp_path) -> Demo:
    return Demo(DemoConfig(output_dir=tmp_path / "demo"))


def parse_training(demo: Demo, job: Job) -> TrainPipelineConfig:
    return TrainPipelineConfig.from_pretrained(demo.train_config, cli_args=list(job.command.arguments[1:]))


def finish_recording(demo: Demo) -> None:
    settings = demo.demonstrations / SETTINGS_FILE
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(demo.recording.settings()))


def finish_training(demo: Demo, step: int, of: int, policy: str = "lerobot_pi0") -> None:
    folder = demo.training / "checkpoints" / f"{step:06d}" / "pretrained_model"
    folder.mkdir(parents=True)
    (folder / "train_config.json").write_text(
        json.dumps({"steps": of, "log_freq": 5, "policy": {"type": policy, "n_action_steps": 4}})
    )
    (folder / "model.safetensors").touch()
    last = demo.training.joinpath("checkpoints", "last")
    last.unlink(missing_ok=True)
    last.symlink_to(f"{step:06d}")


def finish_evaluation(demo: Demo, name: str, tasks: list[str]) -> Path:
    metrics = {"successes": [True] * demo.eval_episodes, "video_paths": []}
    info = demo.root / name / "eval_info.json"
    info.parent.mkdir(parents=True)
    per_task = [{"task_group": task, "task_id": 0, "metrics": metrics} for task in tasks]
    info.write_text(json.dumps({"per_task": per_task}))
    return info


def test_what_is_recorded_is_what_is_trained_on_and_evaluated(tmp_path, monkeypatch):
    demo = Demo(DemoConfig(output_dir=tmp_path / "demo", tasks="plate-slide-v3,door-unlock-v3", moved=0.07))
    (recording,), (training,) = demo.record(), demo.train()
    recorded = draccus.parse(RecordConfig, args=recording.command.arguments)
    assert recorded.recording() == demo.recording
    assert recorded.recording().moved == 0.07
    trained = parse_training(demo, training)
    assert trained.dataset.root == str(recorded.root)
    assert trained.dataset.repo_id == demo.recording.repo_id
    finish_training(demo, step=30, of=30)
    monkeypatch.setattr(sys, "argv", ["lerobot-eval"])  # LeRobot looks there for --policy.path
    (evaluation,) = demo.evaluate()
    env = draccus.parse(EvalPipelineConfig, args=evaluation.command.arguments[1:]).env
    assert isinstance(env, MetaworldFastEnvConfig)
    assert (env.task, env.moved) == (recorded.tasks, 0.07)


@pytest.mark.parametrize(("policy", "kind"), [("pi0", Pi0Config), ("pi05", Pi05Config)])
def test_the_training_command_gives_a_small_policy_that_stays_on_this_machine(policy, kind, tmp_path):
    demo = Demo(DemoConfig(policy=policy, output_dir=tmp_path / "demo"))
    (training,) = demo.train()
    assert training.command.arguments[0] == f"--config_path={shipped_config('demo')}"
    config = parse_training(demo, training)
    assert type(config.policy) is kind
    assert config.policy.vlm.width <= 512
    assert not config.policy.push_to_hub
    assert config.output_dir == demo.training


def test_the_evaluation_commands_cover_all_tasks_and_the_swapped_pair_in_unseen_scenes(demo, monkeypatch):
    finish_training(demo, step=30, of=30)
    monkeypatch.setattr(sys, "argv", ["lerobot-eval"])  # LeRobot looks there for --policy.path
    plain, swapped = (
        draccus.parse(EvalPipelineConfig, args=job.command.arguments[1:]) for job in demo.evaluate()
    )
    assert isinstance(plain.env, MetaworldFastEnvConfig)
    assert isinstance(swapped.env, MetaworldFastEnvConfig)
    assert plain.env.task == demo.recording.tasks
    assert not plain.env.swap_instructions
    assert swapped.env.task == ",".join(PAIR)
    assert swapped.env.swap_instructions
    assert plain.env.steps_per_picture == swapped.env.steps_per_picture == 4  # the policy's n_action_steps
    for config in (plain, swapped):
        assert config.eval.n_episodes == 40
        assert config.seed == EVALUATION_SEED
        assert EVALUATION_SEED + plain.eval.n_episodes <= demo.recording.seed


def test_the_commands_name_the_checkpoint_that_training_leaves(demo):
    finish_training(demo, step=30, of=30)
    for job in demo.evaluate():
        assert job.command.arguments[0] == f"--policy.path={demo.checkpoint}"


def test_steps_that_are_done_are_not_repeated(demo):
    finish_recording(demo)
    finish_training(demo, step=30, of=30)
    finish_evaluation(demo, "evaluate", demo.tasks)
    finish_evaluation(demo, "evaluate_swapped", PAIR)
    assert demo.record() == []
    assert demo.train() == []
    assert demo.evaluate() == []


def test_interrupted_training_goes_on_from_its_last_checkpoint(demo):
    finish_training(demo, step=15, of=30)
    (job,) = demo.train()
    assert job.first_step == 15
    assert "--resume=true" in job.command.arguments
    assert f"--config_path={demo.checkpoint / 'train_config.json'}" in job.command.arguments


def test_training_that_left_no_checkpoint_starts_anew(demo):
    (demo.training / "wandb").mkdir(parents=True)
    (demo.root / "logs").mkdir(parents=True)
    (demo.root / "logs" / "train.log").touch()
    (job,) = demo.train()
    assert "--resume=true" not in job.command.arguments
    assert not demo.training.exists()  # lerobot-train refuses a folder that exists


def test_a_training_older_than_its_settings_is_reused_with_a_warning(demo, tmp_path, caplog):
    demo.train_config = tmp_path / "mine.yaml"
    demo.train_config.touch()
    finish_training(demo, step=30, of=30)
    assert demo.train() == []
    assert not caplog.records
    os.utime(demo.train_config, (2**33, 2**33))
    assert demo.train() == []
    assert "mine.yaml is newer than the training" in caplog.text


def test_checkpoints_outlive_the_link_to_the_newest(demo):
    finish_training(demo, step=15, of=30)
    last = demo.training / "checkpoints" / "last"
    last.unlink()
    (demo.root / "logs").mkdir(parents=True)
    (demo.root / "logs" / "train.log").touch()
    with pytest.raises(FileExistsError, match=r"ln -sfn 000015 .*last"):
        demo.train()
    assert (demo.training / "checkpoints" / "000015" / "pretrained_model").exists()


def test_a_recording_with_other_settings_is_told_by_the_demos_flag(tmp_path):
    finish_recording(Demo(DemoConfig(quick=True, output_dir=tmp_path)))
    with pytest.raises(FileExistsError, match=r"--episodes_per_task=2.*--output_dir") as error:
        Demo(DemoConfig(output_dir=tmp_path)).record()
    assert "--root" not in str(error.value)


@pytest.mark.parametrize("quick", [False, True])
def test_a_quick_training_is_not_taken_for_a_real_one_nor_the_reverse(tmp_path, quick):
    demo = Demo(DemoConfig(quick=quick, output_dir=tmp_path / "demo"))
    finish_training(demo, step=10, of=30 if quick else 10)
    with pytest.raises(FileExistsError, match=r"--quick\. Choose another --output_dir"):
        demo.train()


def test_a_folder_that_is_not_the_demos_is_left_alone(demo):
    precious = demo.training / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(FileExistsError, match="--output_dir"):
        demo.train()
    assert precious.exists()


def test_a_training_of_the_other_policy_is_not_taken_for_this_ones(tmp_path):
    other = Demo(DemoConfig(policy="pi05", output_dir=tmp_path / "demo"))
    finish_training(other, step=30, of=30, policy="lerobot_pi0")
    with pytest.raises(FileExistsError, match=r"holds a lerobot_pi0, .*--output_dir"):
        other.train()
    finish_training(other, step=40, of=40, policy="lerobot_pi05")
    assert other.train() == []


def test_an_evaluation_older_than_the_checkpoint_is_repeated(demo):
    info = finish_evaluation(demo, "evaluate", demo.tasks)
    finish_evaluation(demo, "evaluate_swapped", PAIR)
    finish_training(demo, step=30, of=30)
    os.utime(info, (0, 0))
    assert [job.name for job in demo.evaluate()][:1] == ["evaluate"]


def test_an_evaluation_of_fewer_episodes_is_repeated(demo):
    finish_training(demo, step=30, of=30)
    finish_evaluation(demo, "evaluate", demo.tasks)
    finish_evaluation(demo, "evaluate_swapped", PAIR)
    demo.eval_episodes += 1
    assert [job.name for job in demo.evaluate()] == ["evaluate", "evaluate_swapped"]


def test_baselines_are_computed_once_for_a_recording_and_its_evaluations(demo, monkeypatch):
    finish_recording(demo)
    finish_training(demo, step=30, of=30)
    computed = []

    def open_loop_baseline(self, evaluation):
        computed.append(evaluation.name)
        return dict.fromkeys(evaluation.tasks, 0.25)

    monkeypatch.setattr(Demo, "open_loop_baseline", open_loop_baseline)
    os.utime(demo.demonstrations / SETTINGS_FILE, (0, 0))
    first = demo.open_loop_baselines()
    assert first == [dict.fromkeys(demo.tasks, 0.25), {}]  # with swapped instructions nothing is to be solved
    assert demo.open_loop_baselines() == first
    assert computed == ["evaluate"]
    demo.eval_episodes += 1
    demo.open_loop_baselines()
    os.utime(demo.demonstrations / SETTINGS_FILE, (2**33, 2**33))
    demo.open_loop_baselines()
    assert computed == ["evaluate"] * 3


def test_the_quick_demo_is_small_and_kept_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick, real = Demo(DemoConfig(quick=True)), Demo(DemoConfig())
    demos = [quick, real, *(Demo(DemoConfig(policy="pi05", quick=quick)) for quick in (True, False))]
    assert len({demo.root for demo in demos}) == 4
    assert quick.recording.episodes_per_task < 5
    config = parse_training(quick, *quick.train())
    assert config.steps <= 50
    assert config.save_freq < config.steps  # so that a run can be resumed


def test_the_time_that_is_left_follows_the_speed_of_this_machine():
    expected = {"record": 60, "train": 120, "report": 60}
    assert minutes_left(expected, {}, "record") == "4 minutes"
    assert minutes_left(expected, {"record": 120.0}, "train") == "6 minutes"
    assert minutes_left(expected, {"train": 120.0}, "report") == "1 minute"  # the recording was reused


def test_wandb_goes_through_lerobots_own_settings(tmp_path):
    demo = Demo(DemoConfig(output_dir=tmp_path, wandb=True))
    config = parse_training(demo, *demo.train())
    assert config.wandb.enable
    assert config.wandb.mode == "offline"


@pytest.mark.parametrize(
    ("setting", "flag"),
    [({"eval_episodes": 0}, "--eval_episodes"), ({"train_config": Path("nowhere.yaml")}, "--train_config")],
)
def test_a_setting_that_cannot_work_is_refused_by_its_flag(setting, flag):
    with pytest.raises(ValueError, match=flag):
        DemoConfig(**setting)
