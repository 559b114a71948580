"""The forward process behind a diffusers scheduler, what its model predicts, and which timestep the model is given.

    DDPM family     betas:   alpha^2 = prod (1 - beta_i) in float64; the model is given t - 1
    flow matching   sigmas:  alpha = 1 - sigma, with the scheduler's shift; the model is given the scheduler's timesteps
    EDM             sigmas:  alpha = 1; the model is given 0.25 log sigma; inputs and outputs are preconditioned

Schedulers list noise first; here noise increases with t, so their tables are turned round. ``scheduler_for`` goes the
other way.
"""

__all__ = ["ScheduledProcess", "process_from_scheduler", "read_scheduler", "scheduler_for"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difficulty.diffusers_network import load_component
from difficulty.errors import InputError, choose
from difficulty.process import Array, Process, from_arrays

PREDICTION_TYPES: Mapping[str, str] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@dataclass(frozen=True, eq=False)
class ScheduledProcess:
    """A process and how the scheduler's model is called on it.

    Args:
        process: the forward process.
        prediction: what the model predicts, a name in ``difficulty.prediction.PREDICTIONS`` with its options.
        model_timesteps: what the model is given at t, shape (T+1,); entry 0 is never used.
        unit_input: whether the model is given x_t / sqrt(alpha^2 sd^2 + sigma^2), as EDM's is.
    """

    process: Process
    prediction: str
    model_timesteps: Array
    unit_input: bool = False


def read_scheduler(folder: Path) -> ScheduledProcess:
    """The process of the scheduler that ``save_pretrained`` left in a folder, or in its subfolder ``scheduler``.

    Raises:
        InputError: if there is none, or it cannot be read as a process.
    """
    for place in (folder, folder / "scheduler"):
        if (place / "scheduler_config.json").exists():
            return process_from_scheduler(load_component(place, "scheduler_config.json"))
    raise InputError(f"{folder} is no process: neither it nor its subfolder scheduler holds scheduler_config.json")


def process_from_scheduler(scheduler: Any) -> ScheduledProcess:
    """The process of a diffusers scheduler instance.

    Raises:
        InputError: if the kind of scheduler or its prediction type is unknown.
    """
    name = type(scheduler).__name__
    for kind, read in READERS.items():
        if kind in name:
            return read(scheduler, name)
    if hasattr(scheduler, "alphas_cumprod"):
        return _from_betas(scheduler, name)
    raise InputError(
        f"scheduler {name} has neither alphas_cumprod nor a known kind of sigmas; give its alpha and sigma as arrays "
        f"(difficulty.from_arrays)"
    )


def _from_betas(scheduler: Any, name: str) -> ScheduledProcess:
    betas = scheduler.betas.double().numpy()
    with np.errstate(divide="ignore"):  # a zero terminal SNR has beta = 1
        log_alpha_squared = np.cumsum(np.log1p(-betas))
    # Some change it afterwards, by another scale of the signal or a last value of zero.
    own = scheduler.alphas_cumprod.double().numpy()
    if not np.allclose(np.exp(log_alpha_squared)[:-1], own[:-1], rtol=1e-4, atol=1e-6):
        raise InputError(f"{name} changes its alphas_cumprod after its betas; give them as arrays (.npz)")
    if scheduler.config.get("timestep_type", "discrete") != "discrete":
        raise InputError(f"{name} gives its model {scheduler.config.timestep_type} timesteps, which is not known here")
    process = from_arrays(np.exp(0.5 * log_alpha_squared), np.sqrt(-np.expm1(log_alpha_squared)), name)
    prediction = choose(f"prediction type of {name}", scheduler.config.prediction_type, PREDICTION_TYPES)
    return ScheduledProcess(process, prediction, np.arange(-1.0, process.T))


def _ascending(scheduler: Any) -> tuple[Array, Array]:
    """sigmas and model timesteps from clean to noisy, without the final 0."""
    sigmas, timesteps = (np.asarray(a.cpu(), dtype=np.float64) for a in (scheduler.sigmas, scheduler.timesteps))
    kept = sigmas[: len(timesteps)] > 0
    return sigmas[: len(timesteps)][kept][::-1], timesteps[kept][::-1]


def _from_flow(scheduler: Any, name: str) -> ScheduledProcess:
    if scheduler.config.get("use_dynamic_shifting"):
        raise InputError(f"{name} shifts its sigmas by the image size; set_timesteps with mu and give arrays instead")
    sigmas, timesteps = _ascending(scheduler)
    process = from_arrays(1 - sigmas, sigmas, name)
    return ScheduledProcess(process, "velocity", np.concatenate([[0.0], timesteps]))


def _from_edm(scheduler: Any, name: str) -> ScheduledProcess:
    if scheduler.config.prediction_type != "epsilon":  # what diffusers calls the output of Karras' preconditioning
        raise InputError(f"{name} has prediction type {scheduler.config.prediction_type!r}; known is epsilon")
    sigmas, timesteps = _ascending(scheduler)
    process = from_arrays(np.ones_like(sigmas), sigmas, name)
    prediction = f"edm:sigma_data={float(scheduler.config.sigma_data)}"
    return ScheduledProcess(process, prediction, np.concatenate([[0.0], timesteps]), unit_input=True)


READERS: Mapping[str, Callable[[Any, str], ScheduledProcess]] = {"FlowMatch": _from_flow, "EDM": _from_edm}


def scheduler_for(process: Process, prediction: str) -> Any:
    """The diffusers scheduler that samples a model of this process and prediction: DDIM, or Euler for flow matching.

    Raises:
        InputError: if diffusers is missing, or has no scheduler that an unconditional pipeline could use.
    """
    try:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    except ImportError:
        raise InputError("a scheduler needs diffusers; install denoising-difficulty[diffusers]") from None
    alpha, sigma, u = process.alpha, process.sigma, np.arange(process.T + 1) / process.T
    if prediction == "velocity" and np.allclose([alpha, sigma], [1 - u, u], atol=1e-9):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=process.T)
    types = {own: theirs for theirs, own in PREDICTION_TYPES.items()}
    if prediction in types and np.allclose(alpha**2 + sigma**2, 1, atol=1e-9) and alpha[-1] > 0:
        return DDIMScheduler(
            num_train_timesteps=process.T,
            trained_betas=(1 - (alpha[1:] / alpha[:-1]) ** 2).tolist(),
            prediction_type=types[prediction],
            clip_sample=False,
            timestep_spacing="trailing",  # the only spacing whose steps are as long as DDIM's formula takes them to be
        )
    raise InputError(
        f"diffusers has no pipeline for process {process.name!r} with prediction {prediction!r}; it has them for vp-* "
        "with eps, x0 or v, and for flow-matching with velocity"
    )
