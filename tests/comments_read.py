"""Once this module is imported, `lerobot-train` and `lerobot-eval` are parsed without reading a source.

For the server of `forked.py`, from which each program is a new process.
"""

import cached_comments  # noqa: F401  # what is read is kept
from draccus.argparsing import ArgumentParser
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.train import TrainPipelineConfig

for config_class in (TrainPipelineConfig, EvalPipelineConfig):
    ArgumentParser(config_class)
