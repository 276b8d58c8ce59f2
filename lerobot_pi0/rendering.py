"""Which OpenGL library MuJoCo renders with. It chooses when it is imported."""

import os
import sys

ADVICE = (
    "On a machine without a display set MUJOCO_GL=egl and, on Debian or Ubuntu, run "
    "`apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libgl1`"
)


def choose_renderer() -> None:
    """Call before MuJoCo is imported: without a display it would choose a library that needs one."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
