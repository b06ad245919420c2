"""The shape of a Diffusion Transformer: plain numbers, validated once, shared by every other part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dydit.errors import ShapeError

CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero", "adaln_single")

# Tokens that a conditioning design appends to the sequence: in-context adds the timestep and the label.
EXTRA_TOKENS = {"in_context": 2}

# Width of the sinusoid that the timestep MLP reads (Peebles & Xie 2023).
FREQUENCY_SIZE = 256

# Equal parts of the position embedding's channels: sines and cosines, of the column and of the row.
POSITION_PARTS = 4


@dataclass(frozen=True)
class ModelShape:
    """Numbers that fix a DiT's parameters and compute.

    Args:
        sample_size: latent height and width.
        patch_size: side P of a square patch; divides both.
        in_channels: latent channels C.
        out_channels: C, or 2C when the covariance is learned.
        hidden_size: D; divisible by ``num_heads`` and by 4.
        depth: number of blocks L.
        num_heads: attention heads H.
        mlp_hidden: hidden units of the MLP; divisible by ``mlp_groups``.
        mlp_groups: channel groups G of the MLP that are switched together.
        num_classes: labels without the null class.
        conditioning: one of ``CONDITIONINGS``.
        context_dim: width of a text token (adaln_single only).
        context_length: number of text tokens (adaln_single only).
        null_class: whether the label table ends with a row for "no label".
        embeds_per_block: every block has a timestep MLP of its own (diffusers' ``DiTTransformer2DModel``).

    Raises:
        ShapeError: a number is below 1, does not divide what it should, or the conditioning is unknown.
    """

    sample_size: tuple[int, int]
    patch_size: int
    in_channels: int
    out_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_hidden: int
    mlp_groups: int
    num_classes: int
    conditioning: str = "adaln_zero"
    context_dim: int = 0
    context_length: int = 0
    null_class: bool = True
    embeds_per_block: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "depth", "num_classes"):
            _check_positive(name, getattr(self, name))
        if len(self.sample_size) != 2:
            raise ShapeError(f"sample_size {self.sample_size}", expected="one side, or (height, width)")
        for side in self.sample_size:
            _check_divides("patch_size", self.patch_size, "sample_size", side)
        _check_divides("num_heads", self.num_heads, "hidden_size", self.hidden_size)
        _check_divides(
            "the sine-cosine position embedding's", POSITION_PARTS, "hidden_size", self.hidden_size
        )
        _check_divides("mlp_groups", self.mlp_groups, "mlp_hidden", self.mlp_hidden)
        if self.conditioning not in CONDITIONINGS:
            raise ShapeError(
                f"conditioning {self.conditioning!r}", expected="one of " + ", ".join(CONDITIONINGS)
            )
        if self.takes_text:
            _check_positive("context_dim", self.context_dim)
            _check_positive("context_length", self.context_length)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        height, width = self.sample_size
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens(self) -> int:
        """Sequence length N inside the blocks, tokens appended for conditioning included."""
        rows, columns = self.grid
        return rows * columns + self.extra_tokens

    @property
    def extra_tokens(self) -> int:
        """Tokens appended to the image's for conditioning."""
        return EXTRA_TOKENS.get(self.conditioning, 0)

    @property
    def head_dim(self) -> int:
        """Width d of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def group_size(self) -> int:
        """Hidden MLP units in one group."""
        return self.mlp_hidden // self.mlp_groups

    @property
    def takes_text(self) -> bool:
        """Whether the label is text tokens (M, context_dim) in place of a class."""
        return self.conditioning == "adaln_single"

    @property
    def learn_sigma(self) -> bool:
        """Whether the output holds covariance channels behind the noise prediction."""
        return self.out_channels == 2 * self.in_channels

    def with_groups(self, mlp_groups: int) -> ModelShape:
        """The same shape with the MLP cut into ``mlp_groups`` groups.

        Raises:
            ShapeError: the groups do not divide the hidden units.
        """
        return replace(self, mlp_groups=mlp_groups)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ShapeError(f"{name} is {value}", expected="at least 1")


def _check_divides(name: str, divisor: int, whole_name: str, whole: int) -> None:
    _check_positive(name, divisor)
    _check_positive(whole_name, whole)
    if whole % divisor:
        raise ShapeError(f"{name} {divisor} does not divide {whole_name} {whole}")
