"""The process that draws a simulated camera's pictures. A script of its own: it imports neither LeRobot nor
torch, and starts in a second.

From standard input it reads the length of a model (8 bytes), the model as MuJoCo saves it, and then again and
again the positions (nq float64) of the scene to draw. To standard output it writes a byte when it can draw,
and then the picture of each scene, H·W·3 bytes. It ends when its input does: also when the process that
started it is killed.

Arguments: name of the camera, width, height.
"""

import signal
import sys

import mujoco
import numpy as np


def main(camera: str, width: int, height: int) -> None:
    """Draw until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the robot, which then closes the input
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    saved = source.read(int.from_bytes(source.read(8), "little"))
    model = mujoco.MjModel.from_binary_path("model.mjb", assets={"model.mjb": saved})
    # In software, multisampling takes most of the time.
    model.vis.quality.offsamples = 0
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    data = mujoco.MjData(model)
    with mujoco.Renderer(model, height, width) as renderer:
        renderer.update_scene(data, camera=camera)
        renderer.render()  # the first takes a second
        sink.write(b"\n")
        sink.flush()
        while len(positions := source.read(model.nq * 8)) == model.nq * 8:
            data.qpos[:] = np.frombuffer(positions)
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera=camera)
            sink.write(renderer.render().tobytes())
            sink.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
