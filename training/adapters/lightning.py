"""A Lightning callback that reports losses to the sampler and puts its state into Lightning's checkpoints."""

__all__ = ["lightning_callback"]

import importlib
from typing import Any

from training.adapters.draws import Draws


def lightning_callback(draws: Draws, base: Any = None) -> Any:
    """A callback; the module itself calls ``draws.indices(n, device)`` or another axis in ``training_step``.

    Args:
        draws: the timesteps.
        base: Lightning's ``Callback``; None imports it from ``lightning`` or ``pytorch_lightning``.
    """
    if base is None:
        try:
            base = importlib.import_module("lightning.pytorch").Callback
        except ImportError:
            base = importlib.import_module("pytorch_lightning").Callback

    class CurriculumCallback(base):
        """Stage decisions and resuming for a curriculum under Lightning."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """Report the loss of the batch, averaged over all ranks by the trainer's own strategy."""
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            if draws.sampler.pacing.wants_loss:
                loss = trainer.strategy.reduce(loss.detach(), reduce_op="mean")
            draws.update(loss)

        def state_dict(self) -> dict[str, Any]:
            """Into Lightning's checkpoint."""
            return draws.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """From Lightning's checkpoint."""
            draws.load_state_dict(state_dict)

    return CurriculumCallback()
