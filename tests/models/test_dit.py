from __future__ import annotations

import pytest
import torch
from core_builders import embedded, relative_error, small_dit, small_inputs
from torch import Tensor

from dydit.errors import DataError, ShapeError
from dydit.models.dit import DiT
from dydit.shapes import CONDITIONINGS

# Names that the public DiT checkpoints use (REFERENCE: interface facts).
PUBLIC_NAMES = {
    "pos_embed",
    "x_embedder.proj.weight", "x_embedder.proj.bias",
    "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias",
    "y_embedder.embedding_table.weight",
    *(
        f"blocks.{i}.{layer}.{kind}"
        for i in range(2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    ),
    "final_layer.linear.weight", "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
}  # fmt: skip


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("sample_size", [8, (4, 16)])
def test_output_shape(conditioning: str, learn_sigma: bool, sample_size: int | tuple[int, int]) -> None:
    model = small_dit(conditioning=conditioning, learn_sigma=learn_sigma, sample_size=sample_size)
    x, y = small_inputs(model.shape, batch=2)
    output = model(x, torch.tensor([3, 999]), y)
    assert output.shape == (2, 6 if learn_sigma else 3, *x.shape[2:])
    assert model.shape.learn_sigma is learn_sigma
    assert output.std() > 1e-3


def test_state_dict_names_are_those_of_the_public_checkpoints() -> None:
    assert set(small_dit().state_dict()) == PUBLIC_NAMES


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_sample_does_not_see_its_batch(conditioning: str) -> None:
    model = small_dit(conditioning=conditioning)
    x, y = small_inputs(model.shape, batch=3)
    t = torch.tensor([1.0, 250.0, 999.0])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert relative_error(model(x, t, y), alone) < 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_timestep_label_and_position_all_matter(conditioning: str) -> None:
    model = small_dit(conditioning=conditioning)
    x, y = small_inputs(model.shape)
    output = model(x, 500.0, y)
    assert relative_error(model(x, 20.0, y), output) > 1e-3
    assert relative_error(model(x, 500.0, y.roll(1, 0)), output) > 1e-3
    rolled = model(x.roll(2, dims=3), 500.0, y).roll(-2, dims=3)  # one patch along the width
    assert relative_error(rolled, output) > 1e-3


@pytest.mark.parametrize(
    "t", [500, 500.0, torch.tensor(500), torch.tensor([500, 500, 500]), torch.tensor([500.0] * 3)]
)
def test_timesteps_in_every_form(t: Tensor | float) -> None:
    model = small_dit()
    x, y = small_inputs(model.shape)
    assert torch.equal(model(x, t, y), model(x, torch.full((3,), 500.0), y))


@pytest.mark.parametrize("conditioning", ["adaln", "adaln_zero"])
def test_fresh_adaptive_models_put_out_zero(conditioning: str) -> None:
    shape = {"sample_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4}
    model = DiT(**shape, conditioning=conditioning)  # type: ignore[arg-type]
    x, y = small_inputs(model.shape)
    assert model(x, 5, y).abs().max() == 0


def test_fresh_adaln_zero_blocks_are_the_identity() -> None:
    model = DiT(sample_size=8, hidden_size=32, depth=2, num_heads=4)
    x, y = small_inputs(model.shape)
    tokens, cond = embedded(model, x, 5, y)
    assert torch.equal(model.blocks[0](tokens, cond), tokens)


def test_unpatchify_inverts_the_patch_order() -> None:
    """A decoder that hands each token's patch through puts every pixel back where it was."""
    model = small_dit(hidden_size=12, num_heads=1, sample_size=(4, 6), learn_sigma=False)
    x, y = small_inputs(model.shape, batch=2)
    _, cond = embedded(model, x, 0, y)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, rows, columns, P, P)
    tokens = patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 12)  # channel last within a patch
    model.final_layer.forward = lambda tokens, cond: tokens  # type: ignore[method-assign]
    assert torch.equal(model.decode(tokens, cond), x)


def test_refuses_latents_of_another_shape() -> None:
    model = small_dit(sample_size=(4, 8))
    x, y = small_inputs(model.shape)
    for wrong in (x.transpose(2, 3), x[:, :2], x[0]):
        with pytest.raises(
            ShapeError, match=r"latent of shape .*; expected \(batch, 3, 4, 8\); give a batch"
        ):
            model(wrong, 5, y)


@pytest.mark.parametrize("label", [-1, 11, 1000])
def test_refuses_labels_outside_the_table(label: int) -> None:
    model = small_dit()
    x, y = small_inputs(model.shape)
    y[1] = label
    with pytest.raises(DataError, match=f"label {label}; expected 0 to 9, or 10 for the null class"):
        model(x, 5, y)
    assert model.null_label == 10


@pytest.mark.parametrize("wrong", [torch.zeros(1), torch.zeros(4), torch.zeros(3, 1)])
def test_refuses_what_is_not_one_per_sample(wrong: Tensor) -> None:
    model = small_dit()
    x, y = small_inputs(model.shape)
    with pytest.raises(
        ShapeError, match="timesteps of shape .*, one per sample; give as many timesteps as latents"
    ):
        model(x, wrong, y)
    with pytest.raises(ShapeError, match="labels of shape"):
        model(x, 5, wrong.long())


@pytest.mark.parametrize("shape", [(1, 15, 12), (1, 5, 12), (2, 5, 12), (5, 12), (3,), (3, 5, 8)])
def test_refuses_what_is_not_one_text_per_sample(shape: tuple[int, ...]) -> None:
    model = small_dit(conditioning="adaln_single")
    x, _ = small_inputs(model.shape)
    told = r"text of shape .*; expected \(3, tokens, 12\), one text per sample; give as many texts as latents"
    with pytest.raises(ShapeError, match=told):
        model(x, 5, torch.zeros(shape))


@torch.no_grad()
def test_texts_of_any_length() -> None:
    model = small_dit(conditioning="adaln_single")
    x, y = small_inputs(model.shape)
    assert relative_error(model(x, 5, y.repeat(1, 2, 1)), model(x, 5, y)) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sample_size": 9}, "patch_size 2 does not divide sample_size 9"),
        ({"sample_size": (8, 8, 8)}, r"sample_size \(8, 8, 8\); expected one side, or \(height, width\)"),
        ({"num_heads": 5}, "num_heads 5 does not divide hidden_size 32"),
        ({"hidden_size": 30, "num_heads": 3}, "4 does not divide hidden_size 30"),
        ({"depth": 0}, "depth is 0; expected at least 1"),
        ({"conditioning": "film"}, "conditioning 'film'; expected one of in_context, cross_attention"),
        ({"conditioning": "adaln_single", "context_dim": 0}, "context_dim is 0"),
    ],
)
def test_refuses_numbers_that_do_not_fit(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        small_dit(**overrides)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(conditioning: str) -> None:
    model = small_dit(conditioning=conditioning).train()
    x, y = small_inputs(model.shape)

    def run() -> tuple[Tensor, list[Tensor]]:
        loss = model(x, 500.0, y).square().mean()
        return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    loss, gradients = run()
    model.enable_gradient_checkpointing()
    loss_again, gradients_again = run()
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert all(g.abs().max() > 0 for g in gradients)
