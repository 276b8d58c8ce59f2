"""The demonstration: record scripted experts in Meta-World, train a small π0 on them, evaluate it.

This package knows LeRobot and the simulator; nothing in the policy imports it, except that the policy's
`__init__` imports `environment` so that `--env.type=metaworld_fast` is registered wherever the plugin is
discovered.
"""
