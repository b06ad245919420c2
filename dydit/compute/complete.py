"""The static model inside of a DyDiT."""

from __future__ import annotations

from torch import Tensor, nn

from dydit.dynamic.dydit import DyDiT


class Complete(nn.Module):
    """A DyDiT with everything on: its backbone, of whatever class."""

    def __init__(self, model: DyDiT) -> None:
        super().__init__()
        self.model, self.shape = model, model.shape

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        """The backbone's prediction; arguments as for the model."""
        return self.model(x, t, y, complete=True)

    def mac_scopes(self) -> dict[str, str]:
        """Name of each block in a MAC report -> the submodule whose call it is."""
        return {block: f"model.{scope}" for block, scope in self.model.mac_scopes().items()}

    def mac_parts(self) -> dict[str, str]:
        """Name of a layer -> its part in a MAC report."""
        return self.model.mac_parts()
