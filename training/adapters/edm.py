"""EDM's loss with sigma drawn by a curriculum (Karras et al. 2022, arXiv 2206.00364, eq. 2 and 8).

    loss = lambda(sigma) |D(y + n; sigma) - y|^2,    n ~ N(0, sigma^2 I),    lambda = (sigma^2 + sd^2)/(sigma sd)^2

lambda follows the sigma that was drawn, whatever its density: the density says where the network looks, the weight how
much an error counts there. Their loop makes its loss by class name from a dictionary, calls it with keywords, pickles
it into every snapshot, and tells it nothing else; so the loss counts its own calls and reports its own mean.
"""

__all__ = ["EDMLoss"]

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difficulty.process import Process, get_process
from training.adapters.draws import Draws
from training.curriculum import Curriculum
from training.timesteps import TimestepSampler


class EDMLoss:
    """Takes the place of ``training.loss.EDMLoss`` in EDM's repository.

    Args:
        curriculum: path of a curriculum.json, or its content.
        budget: calls on one process in the whole run, for pacing rules that spend a share of it: iterations times
            rounds of accumulation.
        process: forward process that the curriculum was made for, with finite sigma/alpha.
        sigma_data: sd, the standard deviation of the data that the preconditioning assumes.
        seed: of sigma; the noise is torch's, as in the original.
        start: calls already made, for a run that is resumed.

    Raises:
        InputError: if the curriculum cannot be read or was made for another process.
    """

    def __init__(
        self,
        curriculum: str | Path | Mapping[str, Any],
        budget: int,
        process: str | Process = "edm",
        sigma_data: float = 0.5,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        self.sigma_data, chosen = sigma_data, get_process(process)
        if isinstance(curriculum, str | Path):
            order = Curriculum.load(curriculum)
        else:
            order = Curriculum.parse(curriculum)
        # Contents, not paths: a snapshot is unpickled on other machines, and when the files are gone.
        self.arguments = {
            "curriculum": order.model_dump(), "budget": budget, "process": replace(chosen, closed_form=None),
            "sigma_data": sigma_data, "seed": seed,
        }  # fmt: skip
        sampler = TimestepSampler(chosen, order, budget=budget, seed=seed)
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if together else 0
        self.world = torch.distributed.get_world_size() if together else 1
        self.draws = Draws(sampler, chosen, rank=rank, world=self.world)
        self.draws.step = start

    def __call__(
        self,
        net: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Weighted squared errors, the shape of images (B, C, H, W)."""
        sigma = self.draws.sigmas([len(images), 1, 1, 1], images.device)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        y, augment_labels = (images, None) if augment_pipe is None else augment_pipe(images)
        noisy = y + sigma * torch.randn_like(y)
        loss = weight * (net(noisy, sigma, labels, augment_labels=augment_labels) - y) ** 2
        if self.draws.sampler.pacing.wants_loss:
            mean = loss.detach().mean()
            if self.world > 1:
                torch.distributed.all_reduce(mean)
            self.draws.update(mean / self.world)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self.arguments, "draws": self.draws.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        EDMLoss.__init__(self, **state["arguments"])
        self.draws.load_state_dict(state["draws"])
