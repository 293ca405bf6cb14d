"""Measured profiles beside predicted ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from problems import measure

from gradflow.specs.stack import StackSpec
from gradflow.theory import Prediction

Profile = NDArray[np.float64]


def profiles(spec: StackSpec, seeds: range) -> Profile:
    """log10 |g_u| / |g_D| of each seed, from the input up."""
    logs = np.array([[row.log10_grad_norm for row in measure(spec, s)[0]] for s in seeds])
    return np.asarray(logs - logs[:, -1:])


def worst(measured: Profile, told: Prediction) -> float:
    """How far the mean of the seeds leaves theory, in half widths of the band of that mean."""
    band = np.array(told.band(len(measured)))
    apart = measured.mean(axis=0) - told.log10_grad_norm
    return float(np.abs(apart[:-1] / (band[:-1, 1] - band[:-1, 0]) * 2).max())
