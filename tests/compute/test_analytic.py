from __future__ import annotations

import torch
from core_builders import random_masks, routing_of, small_dit

from dydit.compute.analytic import executed_macs
from dydit.config import DyDiTConfig
from dydit.costs import static_macs
from dydit.dynamic.compute_loss import compute_ratio
from dydit.routing.routing import Routing


def test_is_exact_and_the_compute_loss_agrees() -> None:
    shape, config = small_dit(sample_size=(8, 16)).shape, DyDiTConfig()
    tokens = torch.rand(3, 2, shape.tokens, generator=torch.Generator().manual_seed(0)) < 0.5
    routing = routing_of(*random_masks(0, 3, shape), tokens)
    macs = executed_macs(shape, config, routing)
    assert macs.dtype == torch.int64 and macs.shape == (3,)
    torch.testing.assert_close(macs / static_macs(shape), compute_ratio(shape, config, routing))


def test_everything_on_without_routers_is_the_static_model() -> None:
    shape = small_dit().shape
    complete = Routing.complete(shape, 2, torch.zeros(1))
    macs = executed_macs(shape, DyDiTConfig(token_routing=False), complete)
    assert macs.tolist() == [static_macs(shape)] * 2
