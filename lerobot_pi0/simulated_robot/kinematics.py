"""Which joint angles bring the gripper's tip of an SO-101 to a point."""

from typing import Any

import numpy as np

from lerobot_pi0.errors import UserError
from lerobot_pi0.simulated_robot.simulation import HOME, JOINTS, TIP, import_mujoco

# The gripper points so far below the horizontal, in degrees: lift, elbow and wrist turn about parallel axes,
# and their angles add up to that.
PITCH = 75.0
TOLERANCE, MAX_TURN, MAX_ITERATIONS = 1e-4, 0.3, 50  # metres and radians; radians


def joints_for_tip(model: Any, point: np.ndarray) -> dict[str, float]:
    """Angles of the arm's joints without the gripper's, in degrees, for the tip at a point (3,) in metres.

    Newton's method from home on, in four unknowns: pan, lift, elbow, wrist; the roll stays as at home.
    Raises ValueError for a point out of reach.
    """
    mujoco = import_mujoco()
    data, jacobian = mujoco.MjData(model), np.zeros((3, model.nv))
    tip = model.site(TIP).id
    angles = np.radians([HOME[joint] for joint in JOINTS])
    for _ in range(MAX_ITERATIONS):
        data.qpos[: len(JOINTS)] = angles
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_jacSite(model, data, jacobian, None, tip)
        error = np.append(point - data.site_xpos[tip], np.radians(PITCH) - angles[1:4].sum())
        if np.abs(error).max() < TOLERANCE:
            return dict(zip(JOINTS[:-1], np.degrees(angles[:-1]).tolist(), strict=True))
        turns = np.linalg.solve(np.vstack([jacobian[:, :4], (0, 1, 1, 1)]), error)
        angles[:4] += np.clip(turns, -MAX_TURN, MAX_TURN)
    raise UserError(f"the point {point.round(3).tolist()} is out of the arm's reach")
