"""A run as TensorBoard events: batch loss, learning rate, stage; held-out nats and loss, in all and per task; samples.

What the tables of a run hold is written a second time in the form that TensorBoard shows while the run goes on. The
tables remain the record. A run that continues after a kill overwrites the events after its checkpoint.
"""

__all__ = ["EventLog"]

from pathlib import Path
from typing import Any

import numpy as np

from difficulty.errors import InputError
from training.heldout import HeldOutLoss
from training.trainer import Trainer

EVERY = 10  # iterations between batch losses


class EventLog:
    """Writes events of one run to a folder.

    Args:
        folder: of the event files, created if missing.

    Raises:
        InputError: if tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("TensorBoard events need tensorboard; install denoising-difficulty[tensorboard]") from None
        self._make, self._folder = SummaryWriter, folder
        self._writer: Any = None
        self._step = 0

    def iteration(self, trainer: Trainer, loss: float) -> None:
        """After every iteration: batch loss, learning rate and stage, every tenth time."""
        self._step = trainer.done
        if trainer.done % EVERY == 0 or self._writer is None:
            writer = self._at(trainer.done)
            writer.add_scalar("train/loss", loss, trainer.done)
            writer.add_scalar("train/learning_rate", trainer.lr_at(trainer.done - 1), trainer.done)
            writer.add_scalar("train/stage", trainer.sampler.stage, trainer.done)

    def evaluation(self, trainer: Trainer, measured: HeldOutLoss) -> None:
        """After every evaluation: held-out nats and loss, in all and per task, of the averaged weights."""
        writer = self._at(trainer.done)
        writer.add_scalar("heldout/nats", measured.nats, trainer.done)
        writer.add_scalar("heldout/loss", measured.loss, trainer.done)
        for task, (nats, loss) in enumerate(zip(measured.nats_per_task, measured.loss_per_task, strict=True)):
            writer.add_scalar(f"task_nats_per_log_snr/{task:02d}", nats, trainer.done)
            writer.add_scalar(f"task_loss/{task:02d}", loss, trainer.done)

    def picture(self, path: Path) -> None:
        """A grid of samples that was drawn as PNG, at the iteration that was last reported."""
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._at(self._step).add_image("samples", pixels, self._step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the files."""
        if self._writer is not None:
            self._writer.close()

    def _at(self, step: int) -> Any:
        """The writer; opened at the first event, which says where a continued run takes over."""
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=step)
        return self._writer
