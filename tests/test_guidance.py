from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dydit.errors import ShapeError
from dydit.guidance import guided_output, with_null

NULL = 10
CHANNELS = 4
X = torch.randn(3, CHANNELS, 2, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 7, 3])


class LabelledModel:
    """Some function of sample, timestep and label, with variance channels; counts its calls' batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        mean = torch.tanh(x * (1 + y.reshape(-1, 1, 1, 1)) + t / 1000)
        return torch.cat([mean, mean.cos()], dim=1)


@given(st.floats(0, 20), st.one_of(st.none(), st.integers(1, CHANNELS + 2)))
def test_one_call_equals_the_formula_in_two(scale: float, guided_channels: int | None) -> None:
    model = LabelledModel()
    output = guided_output(model, X, 500, LABELS, NULL, scale=scale, guided_channels=guided_channels)
    conditional = model(X, 500, LABELS)
    null = model(X, 500, torch.full_like(LABELS, NULL))
    n = CHANNELS if guided_channels is None else min(guided_channels, CHANNELS)
    guided = null[:, :n] + scale * (conditional[:, :n] - null[:, :n])
    torch.testing.assert_close(output[:, :n], guided, rtol=1e-5, atol=1e-5)
    # The other channels, those of the variance among them, are the conditional ones.
    torch.testing.assert_close(output[:, n:], conditional[:, n:])
    assert model.batches[0] == (3 if scale == 1 else 6) and len(model.batches) == 3


def test_scale_one_makes_no_second_half() -> None:
    model = LabelledModel()
    output = guided_output(model, X, 500, LABELS, NULL, scale=1.0, guided_channels=3)
    assert model.batches == [3]
    torch.testing.assert_close(output, model(X, 500, LABELS), rtol=0, atol=0)


def test_guidance_near_one_tends_to_no_guidance() -> None:
    model = LabelledModel()
    near = guided_output(model, X, 500, LABELS, NULL, scale=1 + 1e-6, guided_channels=None)
    torch.testing.assert_close(near, model(X, 500, LABELS), rtol=0, atol=1e-5)


def test_the_output_takes_the_sample_s_dtype() -> None:
    def half(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()

    for scale in (1.0, 2.0):
        output = guided_output(half, X, 1, LABELS, NULL, scale=scale, guided_channels=3)
        assert output.dtype == X.dtype and output.shape == X.shape


def test_no_text_of_another_length_is_refused() -> None:
    texts, null = torch.randn(3, 7, 4), torch.randn(5, 4)
    for wrong in (null, torch.randn(2, 7, 4)):
        with pytest.raises(
            ShapeError, match=r"in the place of texts \(3, 7, 4\) for guidance; expected .*null_y"
        ):
            guided_output(LabelledModel(), X, 500, texts, wrong, scale=2.0, guided_channels=None)
    assert (
        with_null(texts, torch.randn(7, 4)).shape == with_null(texts, torch.randn(3, 7, 4)).shape == (6, 7, 4)
    )
