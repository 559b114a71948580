"""The one confidence level of all intervals of a measurement: 90 %, two-sided."""

__all__ = ["INTERVAL_LEVEL", "Z90"]

INTERVAL_LEVEL = 0.90
# A normal variable lies within +- this many standard deviations with that probability.
Z90 = 1.6448536269514722
