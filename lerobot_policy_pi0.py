"""What LeRobot's plugin scan imports, by the distribution's name. The package registers the rest."""

import lerobot_pi0 as lerobot_pi0
