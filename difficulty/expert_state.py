"""State of an unfinished training of experts: weights, moments of AdamW and the losses so far, in one safetensors file.

The file does not depend on how the experts were run: tensors have a leading axis over all experts of the round, in
their order. Rank 0 gathers it from all ranks and writes it, and hands it out again, so that a run may go on with
another number of processes or another size of blocks.
"""

__all__ = ["ExpertState"]

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from difficulty.engines import Bank
from difficulty.errors import InputError
from difficulty.ranks import Ranks
from difficulty.records import write_bytes

Arrays = list[npt.NDArray[np.float32]]
MOMENTS = ("exp_avg", "exp_avg_sq")


class ExpertState:
    """Reads and writes the state of the experts of all ranks.

    Args:
        path: of the file; None keeps nothing.
        facts: what determines the numbers; a file made under other facts is refused.
        bank: the experts of this rank, in order; None for a rank without any.
        optimizer: of their parameters.
        ranks: that train together, in the order of the experts.
        shape: (experts of this rank, draws) of one array of losses.
    """

    def __init__(
        self,
        path: Path | None,
        facts: Any,
        bank: Bank | None,
        optimizer: torch.optim.Optimizer | None,
        ranks: Ranks,
        shape: tuple[int, int],
    ) -> None:
        self.path, self.bank, self.optimizer, self.ranks, self.shape = path, bank, optimizer, ranks, shape
        self.identity = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()

    def load(self, iterations: Sequence[int]) -> tuple[Arrays, Arrays]:
        """Restore weights and moments; return the losses and excesses taken so far, per checkpoint (none if fresh).

        Args:
            iterations: at which losses are taken.

        Raises:
            InputError: on every rank, if the file is not readable or belongs to a run with other settings.
        """
        tensors = self.ranks.on_first(self._read)
        if tensors is None:
            return [], []
        counts = self.ranks.share([part[0] for part in self.ranks.gather(self.shape)])
        first = sum(counts[: self.ranks.rank])
        own = slice(first, first + self.shape[0])
        done = iterations[len(tensors["losses"]) - 1]
        for block, places in self.bank.slices() if self.bank else []:
            rows = slice(first + places.start, first + places.stop)
            for name, parameter in block.parameters.items():
                with torch.no_grad():
                    parameter.copy_(tensors[f"parameter/{name}"][rows])
                moments = {key: tensors[f"{key}/{name}"][rows].to(parameter.device) for key in MOMENTS}
                step = torch.tensor(float(done), device=parameter.device)
                assert self.optimizer is not None
                self.optimizer.state[parameter] = {"step": step, **moments}
        losses = [values.numpy() for values in tensors["losses"][:, own]]
        return losses, [values.numpy() for values in tensors["excess"][:, own]] if "excess" in tensors else []

    def save(self, losses: Arrays, excess: Arrays) -> None:
        """Gather the state of all ranks and write it; all ranks must call it."""
        if self.path is None:
            return
        parts = [part for part in self.ranks.gather(self._own(losses, excess)) if part]
        if not self.ranks.first:
            return
        joined = {name: torch.cat([part[name] for part in parts], 0) for name in parts[0]}
        for name in ("losses", "excess"):
            if name in joined:
                joined[name] = joined[name].transpose(0, 1)
        content = {name: value.contiguous() for name, value in joined.items()}
        write_bytes(self.path, save(content, {"identity": self.identity}))

    def _own(self, losses: Arrays, excess: Arrays) -> dict[str, Tensor]:
        """The state of this rank, the axis of experts first."""
        if self.bank is None or self.optimizer is None:
            return {}
        found = {"losses": torch.from_numpy(np.stack(losses, axis=1))}
        if excess:
            found["excess"] = torch.from_numpy(np.stack(excess, axis=1))
        for name in self.bank.blocks[0].parameters:
            leaves = [block.parameters[name] for block in self.bank.blocks]
            found[f"parameter/{name}"] = torch.cat([leaf.detach().cpu() for leaf in leaves])
            for key in MOMENTS:
                found[f"{key}/{name}"] = torch.cat([self.optimizer.state[leaf][key].cpu() for leaf in leaves])
        return found

    def _read(self) -> dict[str, Tensor] | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} is not readable ({error}); delete it to start afresh") from None
        if metadata.get("identity") != self.identity:
            raise InputError(f"{self.path} belongs to a run with other settings; delete it or choose another --out")
        return tensors
