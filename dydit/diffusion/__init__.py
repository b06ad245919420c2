"""Training objectives (Improved DDPM, flow matching) and samplers over diffusers' schedulers."""

from dydit.diffusion.loss import DiffusionLoss
from dydit.diffusion.objective import Objective, make_objective
from dydit.diffusion.sampling import Sampler, make_sampler
from dydit.guidance import Denoiser

__all__ = ["Denoiser", "DiffusionLoss", "Objective", "Sampler", "make_objective", "make_sampler"]
