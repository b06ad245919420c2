"""What DiT and DyDiT have in common as diffusers models: how what ``from_pretrained`` read becomes theirs."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from torch import Tensor

from dydit.models.fixed_positions import computed_positions

CACHE_LINE = 64  # bytes


class PretrainedModel(ModelMixin):
    """A diffusers model that computes its fixed positions where a file leaves them out.

    Its weights start at multiples of 64 bytes, as PyTorch's own memory does. diffusers uses a file's tensors
    where they lie in it, at any address, and products of few rows then differ in their last bits.
    """

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Any]) -> None:
        """Called by ``from_pretrained`` with what it read of a file that is not in shards."""
        super()._fix_state_dict_keys_on_load(state_dict)
        for name, tensor in computed_positions(self).items():
            state_dict.setdefault(name, tensor)
        for name, tensor in state_dict.items():
            if isinstance(tensor, Tensor) and tensor.data_ptr() % CACHE_LINE:
                state_dict[name] = tensor.clone()
