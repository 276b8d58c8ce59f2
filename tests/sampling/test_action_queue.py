"""The queue of actions: one per thread that steps the policy."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_policy import CHUNK, batch, first, noise, tiny_policy

from lerobot_pi0.sampling.action_queue import ActionQueue


def test_two_threads_take_the_actions_of_their_own_observations():
    policy = tiny_policy(n_action_steps=CHUNK)
    seen = [first(batch(1, seed=seed)) for seed in (0, 1)]

    def act(observation, turn: threading.Barrier | None = None) -> list[torch.Tensor]:
        policy.reset()
        actions = []
        for _ in range(CHUNK + 2):
            if turn is not None:
                turn.wait(60)
            actions.append(policy.select_action(observation, noise=noise(1)))
        return actions

    alone = [act(observation) for observation in seen]
    turn = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(act, seen, [turn, turn]))
    torch.testing.assert_close(together, alone)
    assert not torch.equal(alone[0][0], alone[1][0])


def test_what_is_cleared_is_the_calling_threads():
    queue = ActionQueue()
    queue.extend(torch.arange(6.0).view(3, 2))
    assert queue.popleft().tolist() == [0.0, 1.0]
    assert queue.last is not None
    with ThreadPoolExecutor(1) as other:
        assert other.submit(len, queue).result() == 0
        other.submit(queue.clear).result()
    assert len(queue) == 2
    queue.clear()
    assert (len(queue), queue.last) == (0, None)
    with pytest.raises(IndexError):
        queue.popleft()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda queue: pickle.loads(pickle.dumps(queue))])
def test_a_copy_is_empty(copied):
    queue = ActionQueue()
    queue.extend(torch.zeros(2, 1))
    assert len(copied(queue)) == 0
    assert len(queue) == 2
