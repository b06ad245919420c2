from __future__ import annotations

import math

import pytest
import torch
from core_builders import small_dit
from hypothesis import assume, given
from hypothesis import strategies as st

from dydit.routing.gates import GateNoise, centred, logistic_noise, logit, threshold_gate, training_gate

DRAWS = 20_000


def test_noise_is_logistic() -> None:
    """The difference of two Gumbel samples: mean 0, variance π²/3, distribution function sigmoid."""
    torch.manual_seed(0)
    noise = logistic_noise(torch.zeros(DRAWS)).double().sort().values
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0, abs=4 * math.sqrt(math.pi**2 / 3 / DRAWS))
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.05)
    empirical = (torch.arange(DRAWS) + 0.5) / DRAWS
    distance = (torch.sigmoid(noise) - empirical).abs().max().item()
    assert distance < 1.63 / math.sqrt(DRAWS)  # Kolmogorov-Smirnov at 1 %


def test_noise_is_the_difference_of_two_gumbel_samples() -> None:
    torch.manual_seed(0)
    gumbels = -torch.empty(2, DRAWS).exponential_().log()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    expected = (gumbels[0] - gumbels[1]).quantile(quantiles)
    found = logistic_noise(torch.zeros(DRAWS)).quantile(quantiles)
    torch.testing.assert_close(found, expected, atol=0.12, rtol=0)


def test_noise_is_finite_at_the_ends_of_the_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0.0, 1 - 2**-24])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: ends.clone())
    assert logistic_noise(torch.zeros(2)).isfinite().all()


@pytest.mark.parametrize("logit_value", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_a_gate_opens_with_the_probability_of_its_score(logit_value: float, temperature: float) -> None:
    torch.manual_seed(0)
    share = training_gate(torch.full((DRAWS,), logit_value), temperature).mean().item()
    probability = 1 / (1 + math.exp(-logit_value))
    assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / DRAWS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_forward_is_hard_and_backward_is_the_soft_derivative(temperature: float) -> None:
    logits = torch.linspace(-6, 6, 50, requires_grad=True)
    torch.manual_seed(3)
    gates = training_gate(logits, temperature)
    assert set(gates.tolist()) == {0.0, 1.0}
    weights = torch.arange(50.0)
    (gradient,) = torch.autograd.grad((weights * gates).sum(), logits)
    torch.manual_seed(3)
    noise = logistic_noise(logits)
    soft = torch.sigmoid((logits + noise) / temperature)
    torch.testing.assert_close(gradient, weights * soft * (1 - soft) / temperature)
    assert torch.equal(gates, (soft > 0.5).float())


def test_what_is_always_on_stays_on_and_passes_no_gradient() -> None:
    logits = torch.tensor([torch.inf, -torch.inf], requires_grad=True)
    gates = training_gate(logits, 5.0)
    assert gates.tolist() == [1.0, 0.0]
    (gradient,) = torch.autograd.grad(gates.sum(), logits)
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_keep_the_dtype_and_stay_hard(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000, dtype=dtype)
    for gates in (training_gate(logits, 5.0), threshold_gate(logits, 0.5)):
        assert gates.dtype == dtype and set(gates.tolist()) == {0.0, 1.0}


def test_gates_are_drawn_from_torchs_generator() -> None:
    logits = torch.zeros(100)
    torch.manual_seed(1)
    first, second = training_gate(logits, 5.0), training_gate(logits, 5.0)
    torch.manual_seed(1)
    assert torch.equal(training_gate(logits, 5.0), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_threshold_gate_compares_the_score(threshold: float) -> None:
    scores = torch.tensor([0.0, 0.05, 0.3, 0.6, 0.95, 1.0], dtype=torch.float64)
    gates = threshold_gate(torch.logit(scores), threshold)
    assert gates.tolist() == (scores > threshold).double().tolist()
    on_the_threshold = torch.tensor(logit(threshold), dtype=torch.float64)
    assert threshold_gate(on_the_threshold, threshold) == 0  # "greater", as published


def test_logit() -> None:
    assert logit(0.5) == 0.0
    assert (logit(0.0), logit(1.0)) == (-math.inf, math.inf)
    assert 1 / (1 + math.exp(-logit(0.3))) == pytest.approx(0.3)


def test_given_noise_decides_and_nothing_is_drawn() -> None:
    logits, noise = torch.zeros(4), torch.tensor([-2.0, -0.1, 0.1, 2.0])
    state = torch.get_rng_state()
    assert training_gate(logits, 5.0, noise).tolist() == [0, 0, 1, 1]
    assert training_gate(logits.bfloat16(), 5.0, noise).dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)


def test_drawn_noise_fits_the_model_and_its_generator() -> None:
    shape = small_dit(conditioning="in_context").shape.with_groups(8)

    def draw(seed: int) -> GateNoise:
        return GateNoise.draw(shape, 3, torch.Generator().manual_seed(seed), torch.device("cpu"))

    state = torch.get_rng_state()
    one, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (one.heads.shape, one.groups.shape, one.tokens.shape) == ((3, 2, 4), (3, 2, 8), (3, 2, 18))
    assert torch.equal(one.tokens, again.tokens) and not torch.equal(one.tokens, other.tokens)
    assert one.temperature is None


def test_a_threshold_of_one_half_changes_nothing_to_the_bit() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    noise = logistic_noise(logits.detach())
    assert centred(logits, 0.5) is logits
    published = torch.sigmoid((logits + noise) / 5.0)
    (expected,) = torch.autograd.grad(published.sum(), logits)
    gates = training_gate(logits, 5.0, noise, threshold=0.5)
    (found,) = torch.autograd.grad(gates.sum(), logits)
    assert torch.equal(gates, (published > 0.5).float()) and torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [0.5, 5.0])
@given(logit_value=st.floats(-20, 20), threshold=st.floats(0.05, 0.95))
def test_training_and_evaluation_mean_the_same_threshold(
    temperature: float, logit_value: float, threshold: float
) -> None:
    """At the middle of the noise, where chances are even, a gate is where evaluation has it."""
    logits = torch.tensor(logit_value, dtype=torch.float64)
    middle = training_gate(logits, temperature, torch.zeros_like(logits), threshold)
    assume(abs(logit_value - logit(threshold)) > 1e-9)
    assert middle == threshold_gate(logits, threshold)


@pytest.mark.parametrize(("logit_value", "threshold"), [(1.0, 0.8), (-1.0, 0.2), (0.0, 0.7)])
def test_a_gate_opens_with_the_probability_of_its_distance_to_the_threshold(
    logit_value: float, threshold: float
) -> None:
    torch.manual_seed(0)
    share = training_gate(torch.full((DRAWS,), logit_value), 5.0, threshold=threshold).mean().item()
    probability = 1 / (1 + math.exp(logit(threshold) - logit_value))
    assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / DRAWS))
    assert torch.sigmoid(centred(torch.tensor(logit_value), threshold)).item() == pytest.approx(probability)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_what_is_always_on_is_so_at_every_threshold(threshold: float) -> None:
    logits = torch.tensor([torch.inf, torch.nan])
    gates = training_gate(logits, 5.0, threshold=threshold)
    assert gates[0] == 1.0 and gates[1].isnan()
