"""Curricula over denoising tasks, and the training that uses and judges them."""

__all__ = ["Curriculum", "TimestepSampler", "TrainPlan", "Trainer", "make_curriculum"]

from training.curriculum import Curriculum
from training.curriculum_builders import make_curriculum
from training.timesteps import TimestepSampler
from training.trainer import Trainer, TrainPlan
