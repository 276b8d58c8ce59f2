"""The flags of `lerobot-pi0 bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BenchSize = Literal["full", "small", "tiny"]
Model = Literal["pi0", "pi05"]


@dataclass
class BenchConfig:
    """Measure this π0 or π0.5 against LeRobot's in-tree one, on this machine: row by row on its processor, or
    with --device in sections on a device."""

    # pi0 or pi05.
    model: Model = "pi0"
    # A device to measure in sections (cuda, cuda:1, cpu). Without it, and without --sections: rows on the
    # processor.
    device: str | None = None
    # Sections to measure, separated by commas: start, ceilings, attention, correctness, chunk, pieces, batch,
    # rtc, in-tree, training, optional (default: these); scaling. Without --device on the processor.
    sections: str = ""
    # Seconds for all sections together. Default: 600.
    budget: float | None = None
    # Where to write the figures as JSON.
    json: Path | None = None
    # Where to write a picture as PNG: of the rows' ratios against their goals, or of the section scaling.
    plot: Path | None = None
    # Rows to measure, separated by commas. Default: all.
    rows: str = ""
    # Measurements per row and side; each of ours is followed by one of theirs.
    repetitions: int = 5
    # Threads of each side. Default: what torch takes by itself.
    threads: int | None = None
    # For checkpoints of random values (7 GB, written once) and logs.
    workdir: Path = Path("outputs/bench")
    # Folder of `lerobot-pi0 demo`: its trained weights and frames tell how exact int8 is.
    demo: Path = Path("outputs/demo")
    # tiny: everything small, to try the command itself; goals are not judged. small: for --sections=scaling
    # on a processor.
    size: BenchSize = "full"
