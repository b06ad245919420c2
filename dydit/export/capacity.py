"""Capacities: a fixed number of tokens per timestep and block, and the difference that it makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dydit.diffusion import Sampler
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError
from dydit.export.recording import Recording, Start, call_bar
from dydit.export.thresholds import Thresholds


@dataclass(frozen=True, eq=False)
class Capacities:
    """Tokens of each sample that enter the MLP in capacity mode, and what that changes.

    Attributes:
        tokens: int32 (S, L).
        multiple: what they were rounded to.
        ratio: deployed MACs over static MACs in capacity mode, mean over the calls of the calibration set.
        call_difference: relative L2 difference of the model's output between capacity and exact mode on the
            same inputs, mean over those calls.
        sample_difference: of the final samples, from the same noise.
    """

    tokens: np.ndarray
    multiple: int
    ratio: float
    call_difference: float
    sample_difference: float


def choose_capacities(recording: Recording, thresholds: Thresholds, multiple: int = 1) -> np.ndarray:
    """The mean number of kept tokens per timestep and block, rounded: int32 (S, L).

    Args:
        multiple: round to multiples of this, so that fewer shapes arise; N itself is always allowed.

    Raises:
        ConfigError: the multiple is not within 1..N.
    """
    N = recording.shape.tokens
    check_multiple(multiple, N)
    if not recording.routing.token_routing:
        return np.full(recording.heads.shape[:2], N, np.int32)
    kept = recording.kept_tokens(thresholds).double().mean(1).cpu().numpy()  # (R, L)
    positions = np.asarray(recording.positions)
    means = np.stack([kept[positions == i].mean(0) for i in range(len(recording.heads))])  # (S, L)
    rounded = multiple * np.floor(means / multiple + 0.5)
    # Between the last multiple and N, the nearer one of the two.
    rounded = np.where(N - means < np.abs(rounded - means), N, rounded)
    return np.minimum(rounded, N).astype(np.int32)


def check_multiple(multiple: int, tokens: int) -> None:
    """Refuse to round to what no block can run.

    Raises:
        ConfigError: the multiple is not within 1..N.
    """
    if not 1 <= multiple <= tokens:
        raise ConfigError(
            f"capacities in multiples of {multiple}",
            expected=f"1 to the model's {tokens} tokens",
            remedy="choose a smaller multiple",
        )


@torch.no_grad()
def measure_capacities(
    model: DyDiT, sampler: Sampler, start: Start, recording: Recording, multiple: int, progress: bool = False
) -> Capacities:
    """Choose capacities at the model's thresholds and measure what they change.

    Runs the masked model, in evaluation, twice over the calibration set: on the recorded inputs, and on a
    trajectory of its own.

    Raises:
        ConfigError: the multiple is not within 1..N.
    """
    thresholds = Thresholds.of(model)
    tokens = choose_capacities(recording, thresholds, multiple)
    by_timestep = dict(zip(sampler.timesteps, tokens.tolist(), strict=True))
    with call_bar(sampler, "capacity mode, same inputs", progress) as bar:
        differences = []
        for call in recording.calls:
            output = model(call.x, call.t, call.y, capacities=by_timestep[call.t])
            differences.append(relative_difference(output, call.output))
            bar.update()
    with call_bar(sampler, "capacity mode, own samples", progress) as bar:

        def limited(x: Tensor, t: float, y: Tensor) -> Tensor:
            bar.update()
            output: Tensor = model(x, t, y, capacities=by_timestep[t])
            return output

        samples = start.walk(sampler, limited, model.null_label)
    return Capacities(
        tokens,
        multiple,
        recording.capacity_ratio(thresholds, torch.from_numpy(tokens)),
        torch.stack(differences).mean().item(),
        relative_difference(samples, recording.samples).item(),
    )


def relative_difference(seen: Tensor, expected: Tensor) -> Tensor:
    """‖seen − expected‖/‖expected‖, a scalar; 0 for two that are equal, zeros too."""
    distance = (seen.double() - expected.double()).norm()
    return torch.where(distance == 0, distance, distance / expected.double().norm())
