"""Names of the random streams of a run; every draw is a function of (seed, stream, step, rank), see `randomness.py`.

Streams are told apart by the second counter. Four counters are always given: numpy pads shorter lists with zeros, and
(seed, 1) would name the same stream as (seed, 1, 0, 0).
"""

__all__ = [
    "BATCH",
    "BOOTSTRAP",
    "CONDITION",
    "FORWARD",
    "HELDOUT",
    "LABELS",
    "NOISE",
    "ORDER",
    "PRIOR",
    "SAMPLER",
    "TIMESTEPS",
]

ORDER = 0  # random order of clusters
BATCH = 1  # which samples form a batch
NOISE = 2  # eps of a batch
TIMESTEPS = 3  # u of a batch
HELDOUT = 4  # the fixed draws on which losses are compared
PRIOR = 5  # where a sampler starts
SAMPLER = 6  # the noise that an ancestral sampler adds
LABELS = 7  # which conditions are dropped
BOOTSTRAP = 8  # projections and resampling in metrics
FORWARD = 9  # what a network draws in its own forward pass, as dropout does
CONDITION = 10  # initial weights of what takes a condition
# 11: draws of an autoencoder's posterior (`difficulty/latents.py`)
