"""What the processor is good at, asked of PyTorch."""

from __future__ import annotations

import pytest
import torch

from dydit.processor import faster_in_one_kernel, faster_with_activation, has, without_onednn


@pytest.mark.parametrize(
    ("told", "expected"), [({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)]
)
def test_amx_as_pytorch_tells(told: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert has("amx_bf16") is expected


def test_none_where_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has("amx_bf16")


@pytest.mark.parametrize(
    ("told", "precisions", "activated"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, {torch.float32}, {torch.float32}),
        (
            {"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": True},
            {torch.float32},
            {torch.float32, torch.bfloat16},
        ),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, set(), set()),
        (
            {"cpu_name": "Intel(R) Xeon(R)", "avx512_bf16": True, "amx_bf16": True},
            {torch.bfloat16},
            {torch.bfloat16},
        ),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_bf16": True}, set(), {torch.bfloat16}),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, set(), set()),
        ({}, set(), set()),
    ],
)
def test_where_onednns_products_are_taken(
    told: dict[str, object],
    precisions: set[torch.dtype],
    activated: set[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert faster_in_one_kernel() == precisions
    assert faster_with_activation() == activated


def test_half_precisions_that_onednn_multiplies_are_pytorchs_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    half = {torch.bfloat16, torch.float16}
    assert without_onednn() <= half
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert without_onednn() == half
