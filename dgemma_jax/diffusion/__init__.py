"""Denoising: noise, one step, the loop over steps, the loop over blocks, and what they record."""

from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.noise import corrupt, temperature
from dgemma_jax.diffusion.sampler import State, accept, categorical, denoise_step, start, token_entropy
from dgemma_jax.diffusion.trajectory import Record, StepView, StopReason, Trajectory

__all__ = [
    "Moment",
    "Record",
    "State",
    "StepView",
    "StopReason",
    "Trajectory",
    "accept",
    "categorical",
    "corrupt",
    "denoise_step",
    "start",
    "temperature",
    "token_entropy",
]
