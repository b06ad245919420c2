"""What the processor is good at, asked of PyTorch."""

from __future__ import annotations

import pytest
import torch

from dydit.processor import has, without_onednn


@pytest.mark.parametrize(
    ("told", "expected"), [({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)]
)
def test_amx_as_pytorch_tells(told: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert has("amx_bf16") is expected


def test_none_where_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has("amx_bf16")


def test_half_precisions_that_onednn_multiplies_are_pytorchs_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    half = {torch.bfloat16, torch.float16}
    assert without_onednn() <= half
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert without_onednn() == half
