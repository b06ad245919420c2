"""Embeddings of positions, timesteps, labels and text."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from dydit.errors import DataError, ShapeError
from dydit.precision import without_autocast
from dydit.shapes import FREQUENCY_SIZE


def sincos_position_embedding(hidden_size: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine embedding (1, N, D) of a (rows, columns) grid, row by row.

    The first half of the channels encodes the column, the second the row; each half is sines, then
    cosines, of the index times 10000^(-k / (D/4)). (Peebles & Xie 2023; the layout of public checkpoints.)
    """
    rows, columns = grid
    frequencies = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))

    def one_axis(index: Tensor) -> Tensor:
        angles = index.double()[:, None] * frequencies  # (N, D/4)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (N, D/2)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    embedding = torch.cat([one_axis(column.reshape(-1)), one_axis(row.reshape(-1))], dim=1)
    return embedding.float()[None]


class TimestepEmbedder(nn.Module):
    """Sinusoid of the timestep (cosines first) through Linear, SiLU, Linear.

    Args:
        hidden_size: D.
        frequency_shift: subtracted from the number of frequencies in the exponent: 0 in the DiT paper's
            models, 1 in diffusers' ``DiTTransformer2DModel``.
    """

    def __init__(self, hidden_size: int, frequency_shift: float = 0.0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps t (B,) in 0..1000 as (B, D)."""
        sinusoid = get_timestep_embedding(
            t, FREQUENCY_SIZE, flip_sin_to_cos=True, downscale_freq_shift=self.frequency_shift
        )
        with without_autocast(t):
            return self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Table of class embeddings; with ``null_class`` the last row is that of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int, null_class: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(null_class), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels y (B,) as (B, D)."""
        return self.embedding_table(y)


class TextEmbedder(nn.Module):
    """Projection of text tokens into the model's width (Linear, GELU, Linear), as in PixArt-α.

    ``null_text`` (M, context_dim) are the tokens of no text, which guidance and label dropout put in a text's
    place: zeros until the text encoder's own are copied there.
    """

    null_text: Tensor

    def __init__(self, context_dim: int, context_length: int, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("null_text", torch.zeros(context_length, context_dim))
        self.fc1 = nn.Linear(context_dim, hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Project text tokens y (B, M, context_dim) to (B, M, D)."""
        return self.fc2(self.act(self.fc1(y)))


def batch_timesteps(t: Tensor | float, x: Tensor) -> Tensor:
    """Timesteps as (B,) on x's device: t is (B,), a scalar tensor, or one number for the whole batch.

    Raises:
        ShapeError: t is neither one number nor one per sample.
    """
    if not isinstance(t, Tensor):
        return torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
    if t.ndim == 0:
        return t.to(x.device).expand(x.shape[0])
    check_per_sample("timesteps", t, x.shape[0])
    return t.to(x.device)


def check_per_sample(name: str, values: Tensor, batch: int) -> None:
    """Refuse values that are not one per sample: broadcasting would hide a mistake, indexing drop samples.

    Raises:
        ShapeError: values is not (B,).
    """
    if tuple(values.shape) != (batch,):
        raise ShapeError(
            f"{name} of shape {tuple(values.shape)}",
            expected=f"({batch},), one per sample",
            remedy=f"give as many {name} as latents, in one dimension",
        )


def check_texts(y: Tensor, batch: int, width: int) -> None:
    """Refuse texts that are not one per sample, as labels are, or another encoder's.

    Raises:
        ShapeError: y is not (B, M, width), of any number of tokens M.
    """
    if y.ndim != 3 or (y.shape[0], y.shape[2]) != (batch, width):
        raise ShapeError(
            f"text of shape {tuple(y.shape)}",
            expected=f"({batch}, tokens, {width}), one text per sample",
            remedy="give as many texts as latents, from the encoder that the model was built for",
        )


def check_labels(y: Tensor, num_classes: int, null_class: bool = True) -> None:
    """Refuse labels that the table has no row for.

    Looks only where that costs nothing: on the CPU and outside of tracing and compiling.

    Raises:
        DataError: names the first label out of range.
    """
    if y.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    bad = y[(y < 0) | (y >= num_classes + int(null_class))]
    if bad.numel():
        null = f", or {num_classes} for the null class" if null_class else "; the model has no null class"
        raise DataError(f"label {bad[0].item()}", expected=f"0 to {num_classes - 1}{null}")
