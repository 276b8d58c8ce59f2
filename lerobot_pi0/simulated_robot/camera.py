"""A camera of the simulation: like a real one it takes pictures at its own rate, whoever looks at them.

A process of its own draws them (`camera_process.py`), so that drawing does not hold up the control loop. A
thread sends it the scene and keeps the newest picture.
"""

import contextlib
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_pi0.errors import CommandError
from lerobot_pi0.rendering import ADVICE
from lerobot_pi0.simulated_robot.simulation import CAMERA, Simulation, import_mujoco

# In seconds. The first picture takes about one, on a busy machine several; later ones 5 ms.
FIRST_PICTURE_TIMEOUT, MAX_AGE, EXIT_TIMEOUT = 60.0, 5.0, 5.0


class SimulatedCamera:
    """Pictures (H, W, 3) uint8 of a simulation."""

    def __init__(self, width: int, height: int, fps: int):
        self.width, self.height, self.fps = width, height, fps
        self._running: _Running | None = None

    @property
    def is_connected(self) -> bool:
        return self._running is not None

    def connect(self, simulation: Simulation) -> None:
        """Start to take pictures of a simulation; returns with the first.

        Raises RuntimeError when the process ends before, TimeoutError when there is none for a minute.
        """
        self._running = _Running(simulation, self.width, self.height, self.fps)
        self._running.first.wait(FIRST_PICTURE_TIMEOUT)
        try:
            self.read_latest()
        except (RuntimeError, TimeoutError):
            self.disconnect()
            raise

    def read_latest(self) -> tuple[float, np.ndarray]:
        """When the newest picture was taken, by the simulation's clock, and a copy of it. Does not wait.

        Raises RuntimeError when the process has ended, TimeoutError when it hangs.
        """
        if self._running is None:
            raise CommandError("the simulated camera is not connected: connect the robot first")
        taken, pixels = self._running.read_latest()
        return taken, np.frombuffer(pixels, np.uint8).reshape(self.height, self.width, 3).copy()

    def disconnect(self) -> None:
        """End the process."""
        if self._running is not None:
            self._running.end()
            self._running = None


class _Running:
    """The process and the thread of a camera that is connected."""

    def __init__(self, simulation: Simulation, width: int, height: int, fps: int):
        import_mujoco()  # says how to render without a display, also to the process
        self.first = threading.Event()  # there is a picture, or there never will be one
        self._simulation, self._size, self._period = simulation, width * height * 3, 1 / fps
        self._latest: tuple[float, bytes] | None = None
        self._stop, self._ended = threading.Event(), threading.Event()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `end`)
        script = Path(__file__).with_name("camera_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), CAMERA, str(width), str(height)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._thread = threading.Thread(target=self._take_pictures, name="simulated camera", daemon=True)
        self._thread.start()

    def read_latest(self) -> tuple[float, bytes]:
        """As `SimulatedCamera.read_latest`."""
        if self._ended.is_set():
            raise CommandError(self._last_words())
        if self._latest is None or self._simulation.clock() - self._latest[0] > MAX_AGE:
            raise TimeoutError(
                f"the simulated camera (process {self.process.pid}) has given no picture for "
                f"{FIRST_PICTURE_TIMEOUT if self._latest is None else MAX_AGE:.0f} s: too busy a machine? "
                "Lower --robot.camera_fps, or connect the robot again"
            )
        return self._latest

    def end(self) -> None:
        """Stop the thread and the process."""
        self._stop.set()
        self._thread.join(EXIT_TIMEOUT)
        try:
            self.process.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def _take_pictures(self) -> None:
        """Runs in the thread, until it is stopped or the process has ended."""
        source: Any = self.process.stdout
        sink: Any = self.process.stdin
        try:
            model = saved(self._simulation.model)
            sink.write(len(model).to_bytes(8, "little") + model)
            sink.flush()
            source.read(1)  # it can draw
            while not self._stop.is_set():
                taken, positions = self._simulation.snapshot()
                sink.write(positions.tobytes())
                sink.flush()
                pixels = source.read(self._size)
                if len(pixels) < self._size:
                    return
                self._latest = (taken, pixels)
                self.first.set()
                self._stop.wait(taken + self._period - self._simulation.clock())
        except BrokenPipeError:
            return
        finally:
            self._ended.set()
            self.first.set()
            with contextlib.suppress(BrokenPipeError):
                sink.close()
            source.close()

    def _last_words(self) -> str:
        """Why the process ended, for a person to read."""
        code = self.process.wait(EXIT_TIMEOUT)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return (
            f"the simulated camera's process ended (exit code {code}{': ' + said[-1] if said else ''}): "
            f"connect the robot again. {ADVICE}"
        )


def saved(model: Any) -> bytes:
    """An `MjModel` as MuJoCo saves it."""
    mujoco = import_mujoco()
    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return buffer.tobytes()
