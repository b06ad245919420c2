"""Settings of the whole suite: hypothesis draws the same examples everywhere, torch keeps to one core."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # on tensors this small a second thread costs more than it gives
# Tests of runs that are killed fork. A child can train only if autograd began its threads, of which a machine
# without a GPU has none, before torch.compile made it believe in devices; whichever test comes first.
torch.ones(1, requires_grad=True).backward()
settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# HYPOTHESIS_PROFILE=explore looks for new counterexamples.
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
