"""What LeRobot's plugin scan imports, by the distribution's name: it registers all that the package has.

A program of your own that uses LeRobot without its commands imports this module first.
"""

import sys

import lerobot_pi0.configuration_pi0  # the policy type `lerobot_pi0`
import lerobot_pi0.configuration_pi05  # the policy type `lerobot_pi05`
import lerobot_pi0.demo.environment  # the environment type `metaworld_fast`
import lerobot_pi0.demo.libero_environment  # the environment type `libero_varied`
import lerobot_pi0.processor_pi0  # the processor steps that saved checkpoints name
import lerobot_pi0.processor_pi05  # likewise
import lerobot_pi0.simulated_robot.config_scripted_so101  # the teleoperator `scripted_so101`
import lerobot_pi0.simulated_robot.config_simulated_so101  # the robot `simulated_so101`  # noqa: F401
from lerobot_pi0.demo.libero_installation import prepare_libero
from lerobot_pi0.lerobot_compat import (
    check_command_line,
    check_version,
    print_user_errors,
    quiet_video_encoder,
    shorten_torchcodec_notice,
)
from lerobot_pi0.rendering import choose_renderer

check_version()
shorten_torchcodec_notice()
quiet_video_encoder()
choose_renderer()  # gym-aloha would choose one that needs a display
prepare_libero()
print_user_errors(sys.argv)
check_command_line(sys.argv)
