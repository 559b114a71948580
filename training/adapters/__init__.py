"""The timestep sampler in other people's training loops: one object, read on the axis that the host thinks in.

``Draws`` counts the steps and gives t as the host wants it; the other modules fit it to hosts that ask for more than a
tensor. docs/adapters.md shows each in at most 15 lines.
"""

__all__ = ["Draws", "EDMLoss", "lightning_callback", "matches_ddpm", "matches_flow", "schedule_sampler"]

from training.adapters.draws import Draws
from training.adapters.edm import EDMLoss
from training.adapters.lightning import lightning_callback
from training.adapters.schedule_sampler import schedule_sampler
from training.adapters.schedulers import matches_ddpm, matches_flow
