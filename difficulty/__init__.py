"""What a denoising task of a diffusion model is, and how hard it is.

    from difficulty import ExpertPlan, measure
    found = measure("digits", "vp-linear", out="runs/digits", plan=ExpertPlan(budget=400))
    print(found.ranking.verdict)
"""

__all__ = [
    "Dataset",
    "Denoiser",
    "ExpertPlan",
    "InputError",
    "Measurement",
    "Process",
    "Ranking",
    "from_arrays",
    "get_process",
    "kl",
    "load_dataset",
    "make_tasks",
    "measure",
    "rank_folder",
]

from difficulty.datasets import Dataset, load_dataset
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError
from difficulty.expert_plan import ExpertPlan
from difficulty.measurement import Measurement, measure
from difficulty.measurement_folder import rank_folder
from difficulty.process import Process, from_arrays, get_process
from difficulty.ranking import Ranking
from difficulty.relative_entropy import kl
from difficulty.tasks import make_tasks
