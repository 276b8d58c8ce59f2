"""What libero_object consists of: objects, instructions, cameras, control rate. Imports nothing."""

SUITE_NAME = "libero_object"

# LIBERO's tasks, called by the object that goes into the basket, and their numbers.
TASK_IDS = {
    name: number
    for number, name in enumerate(
        (
            "alphabet_soup",
            "cream_cheese",
            "salad_dressing",
            "bbq_sauce",
            "ketchup",
            "tomato_sauce",
            "butter",
            "milk",
            "chocolate_pudding",
            "orange_juice",
        )
    )
}
# What else stands in the scene of a task.
OTHERS = {
    "alphabet_soup": ("salad_dressing", "cream_cheese", "milk", "tomato_sauce", "butter"),
    "cream_cheese": ("alphabet_soup", "milk", "tomato_sauce", "butter", "orange_juice"),
    "salad_dressing": ("ketchup", "alphabet_soup", "cream_cheese", "milk", "tomato_sauce"),
    "bbq_sauce": ("chocolate_pudding", "ketchup", "salad_dressing", "alphabet_soup", "cream_cheese"),
    "ketchup": ("bbq_sauce", "salad_dressing", "alphabet_soup", "cream_cheese", "milk"),
    "tomato_sauce": ("milk", "butter", "orange_juice", "chocolate_pudding", "bbq_sauce"),
    "butter": ("tomato_sauce", "orange_juice", "chocolate_pudding", "bbq_sauce", "ketchup"),
    "milk": ("cream_cheese", "tomato_sauce", "butter", "orange_juice", "chocolate_pudding"),
    "chocolate_pudding": ("orange_juice", "bbq_sauce", "ketchup", "salad_dressing", "alphabet_soup"),
    "orange_juice": ("butter", "chocolate_pudding", "bbq_sauce", "ketchup", "salad_dressing"),
}
FPS = 20
# Steps after which LeRobot counts an episode as failed.
EPISODE_LENGTH = 280
# LeRobot's names of the cameras, and LIBERO's.
CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand"}
ACTION_NAMES = ("dx", "dy", "dz", "turn_x", "turn_y", "turn_z", "gripper")
STATE_NAMES = ("x", "y", "z", "axis_x", "axis_y", "axis_z", "finger_left", "finger_right")


def instruction(task: str) -> str:
    """LIBERO's sentence."""
    return f"pick up the {task.replace('_', ' ')} and place it in the basket"
