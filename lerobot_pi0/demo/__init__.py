"""The demonstration: record scripted experts in Meta-World, train a small π0 or π0.5 on them, evaluate it.

This package knows LeRobot and the simulator; nothing in the policy imports it. `lerobot_policy_pi0` imports
`environment`, so that `--env.type=metaworld_fast` is registered wherever the plugin is discovered.
"""
