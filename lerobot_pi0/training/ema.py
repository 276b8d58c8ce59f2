"""Which parameters train, in which precision, their exponential moving average (EMA), and random keys."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lerobot_pi0.errors import UserError
from lerobot_pi0.lerobot_compat import let_idle_threads_sleep
from lerobot_pi0.training.randomness import sample_keys


class TrainedWeights:
    """The parameters that train and their EMA, and the keys of the random numbers that they train with.

    A module shows either the weights (to train) or their EMA (to evaluate); what it does not show is kept
    here. Both are float32. `num_draws` counts the training batches that keys were made for.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.seed = torch.initial_seed()
        self.num_draws = 0
        # Losses to log, which are computed for some batches. LeRobot logs zero where a name has no value.
        self.figures: dict[str, float] = {}
        self.names: list[str] = []  # of what trains
        self.parameters: dict[str, nn.Parameter] = {}  # by these names; none without an EMA
        self._hidden: list[Tensor] = []  # the EMA, or the weights where the EMA is shown
        self._shows_ema = False
        self._is_current = True  # the EMA, with the weights
        self._is_checked = False
        self._losses: tuple[Tensor, Tensor] | None = None

    def take(self, module: nn.Module, frozen_dtype: torch.dtype) -> "ParameterGroups":
        """What trains in a module from now on, as groups for an optimizer; the EMA starts with it.

        This sets the precision: a parameter that trains is float32, so that no step is lost in rounding; a
        frozen one is held in `frozen_dtype` if it was wider.
        """
        for parameter in module.parameters():
            dtype = torch.float32 if parameter.requires_grad else frozen_dtype
            if parameter.requires_grad or parameter.dtype.itemsize > dtype.itemsize:
                parameter.data = parameter.data.to(dtype)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise UserError(
                "nothing trains: all parameters are frozen (--policy.freeze, --peft.target_modules)"
            )
        self.names = list(trained)
        # Without an EMA none is kept: FSDP replaces them by shards, and the whole ones could not be freed.
        self.parameters = trained if self.decay else {}
        if all(parameter.device.type == "cpu" for parameter in trained.values()):
            let_idle_threads_sleep()
        self._hidden = [p.detach().clone() for p in self.parameters.values()]
        self._shows_ema, self._is_current = False, False
        return ParameterGroups(self, trained.values())

    def keys(self, index: Tensor, num_draws: int, training: bool) -> Tensor:
        """Keys (batch · num_draws,) of the random numbers for samples with these indices (batch,).

        In training they depend on the seed and on the number of the batch, else on the indices alone.
        """
        if not training:
            return sample_keys(0, 0, index, num_draws)
        self.num_draws += 1
        return sample_keys(self.seed, self.num_draws - 1, index, num_draws)

    def note(self, losses: Tensor, index: Tensor) -> None:
        """Keep a training batch's losses (batch,) and its samples' indices until `update` checks them."""
        self._losses = losses.detach(), index

    def update(self) -> None:
        """After a step of the optimizer: EMA ← decay · EMA + (1 − decay) · weights.

        Raises UserError if the step's loss was NaN or infinite. Checked here, because LeRobot waits for the
        device after it anyway, and saves later.
        """
        self._check_losses()
        if self.decay and not self.parameters:
            raise UserError(
                "the EMA of the weights needs this policy's own optimizer: leave "
                "--use_policy_training_preset=true, or train with --policy.ema_decay=0"
            )
        self._is_current = True
        if self._hidden:
            weights = [parameter.data for parameter in self.parameters.values()]
            torch._foreach_lerp_(self._hidden, weights, 1 - self.decay)

    def show(self, ema: bool) -> None:
        """Let the module's parameters hold the EMA, or the weights; nothing is copied."""
        if ema == self._shows_ema:
            return
        self._check_current()
        self._shows_ema = ema
        for i, parameter in enumerate(self.parameters.values() if self._hidden else ()):
            parameter.data, self._hidden[i] = self._hidden[i], parameter.data

    def ema(self) -> dict[str, Tensor]:
        """The EMA by the parameters' names; empty where none is kept or where the module shows it."""
        if self._shows_ema or not self._hidden:
            return {}
        self._check_current()
        return dict(zip(self.parameters, self._hidden, strict=True))

    def weights(self) -> list[Tensor]:
        """The weights where an EMA is saved as the policy's; else none."""
        if not self._hidden:
            return []
        return self._hidden if self._shows_ema else [p.data for p in self.parameters.values()]

    def restore(self, weights: dict[int, Tensor], num_draws: int) -> None:
        """Go on from weights, by their number, and a number of draws; the EMA is the loaded policy.

        Raises UserError for the weights of a run with an EMA where none is kept now.
        """
        if weights and not self._hidden:
            raise UserError(
                "this run kept an EMA, and the checkpoint's policy is that EMA: resume with the "
                "--policy.ema_decay that it has in train_config.json, or begin a new run from the checkpoint "
                "(--policy.path, without --resume)"
            )
        self.num_draws = num_draws
        for i, own in enumerate(self.weights()):
            if i in weights:
                own.copy_(weights[i])
                self._is_current = True

    def check(self, module: nn.Module) -> None:
        """Raises UserError for weights that no optimizer should step on, or that no EMA can be kept of.

        Called before each step; checks once.
        """
        if self._is_checked:
            return
        # Costs a second, and this module is imported whenever LeRobot looks for plugins.
        from lerobot_pi0.training.fsdp import is_sharded

        parameters = dict(module.named_parameters())
        narrow = [name for name, p in parameters.items() if p.requires_grad and p.dtype.itemsize < 4]
        if narrow:
            raise UserError(
                f"the optimizer would step on {parameters[narrow[0]].dtype} weights ({narrow[0]}, …), where "
                "small steps are rounded away: leave --use_policy_training_preset=true, which trains in "
                "float32"
            )
        if self._hidden and is_sharded(module):
            raise UserError(
                "the weights are sharded (FSDP), and their EMA is kept of whole ones (one GPU, or "
                "DDP): train with --policy.ema_decay=0, or without FSDP"
            )
        self._is_checked = True

    def check_finite(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Raises UserError if what trained is NaN or infinite in a state dict that is about to be saved.

        The loss of a run's last step says nothing of its gradient. One pass over what trained: a full-size
        policy's 13 GB take a second or two on a CPU, a fraction of the time to write them.
        """
        trained = {name: state[prefix + name] for name in self.names if prefix + name in state}
        if not trained:
            return
        # One pass without a copy. A sum of finite values may overflow: only then each value is looked at.
        sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in trained.values()]).tolist()
        suspects = [name for name, total in zip(trained, sums, strict=True) if not math.isfinite(total)]
        if bad := [name for name in suspects if not trained[name].isfinite().all()]:
            raise UserError(
                f"{len(bad)} of the parameters that train are NaN or infinite ({', '.join(bad[:3])}"
                f"{', …' if len(bad) > 3 else ''}), after a loss that was finite: the gradient of the last "
                "step was not. Nothing was saved. The last good checkpoint is checkpoints/last in the run's "
                "--output_dir: go on from it with a lower --policy.optimizer_lr"
            )

    def _check_losses(self) -> None:
        losses, self._losses = self._losses, None
        if losses is None or losses[0].isfinite().all():
            return
        frames = losses[1][~losses[0].isfinite()].tolist()
        raise UserError(
            f"the loss is NaN or infinite for the frames {frames[:5]} (their index in the dataset): training "
            "stops, and the weights of now are not saved. If the data is finite there (`lerobot-pi0 doctor "
            "--dataset.repo_id=...` checks it), the run diverged: start again from its last checkpoint with "
            "a lower --policy.optimizer_lr"
        )

    def _check_current(self) -> None:
        """Raises UserError when an optimizer has stepped and the EMA was not updated."""
        if self._is_current:
            return
        pairs = zip(self.parameters.values(), self._hidden, strict=False)
        if not all(torch.equal(parameter, ema) for parameter, ema in pairs):
            raise UserError(
                "the weights were trained and their EMA never updated: call policy.update() after each "
                "optimizer.step() as LeRobot does, or train with --policy.ema_decay=0"
            )


class ParameterGroups(list[dict[str, Any]]):
    """Groups as torch's optimizers take them, for one of ours with what they belong to."""

    def __init__(self, trained: TrainedWeights, parameters: Iterable[nn.Parameter]):
        # Fused: CPU, CUDA, MPS and XPU have it.
        super().__init__([{"params": list(parameters), "fused": True}])
        self.trained = trained


def save_ema(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Hook of a policy's `state_dict`: whoever saves it, PEFT included, saves the EMA of what trained."""
    trained: TrainedWeights = module.trained
    state.update({prefix + name: ema for name, ema in trained.ema().items()})
    from lerobot_pi0.training.fsdp import is_sharded  # as above

    if prefix and not is_sharded(module):  # PEFT saves without calling the policy's `_save_pretrained`
        trained.check_finite(state, prefix)
