"""The training configurations in configs/."""

from pathlib import Path

from lerobot.configs import parser
from lerobot.configs.train import TrainPipelineConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@parser.wrap()
def read_training_config(config: TrainPipelineConfig) -> TrainPipelineConfig:
    """As lerobot-train reads its command line."""
    return config
