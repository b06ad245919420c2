"""What the processor is good at, asked of PyTorch."""

from __future__ import annotations

import pytest
import torch

from dydit.processor import has, onednn_multiplies


@pytest.mark.parametrize(
    ("told", "expected"), [({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)]
)
def test_amx_as_pytorch_tells(told: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert has("amx_bf16") is expected


def test_none_where_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has("amx_bf16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_onednn_pytorch_multiplies_half_precision_itself(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert onednn_multiplies(torch.float32)
    assert isinstance(onednn_multiplies(dtype), bool)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn_multiplies(dtype) and onednn_multiplies(torch.float32)
