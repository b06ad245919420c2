"""What a file can be other than the right one: each fault is told in its own words."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_builders import TINY, same_weights, save_pt
from core_builders import small_dit, small_dydit
from safetensors.torch import save_file

from dydit.dynamic.loading import public_state
from dydit.errors import CheckpointError
from dydit.models.dit import DiT
from dydit.models.loading import load_backbone, stored_class


@pytest.fixture()
def model() -> DiT:
    return small_dit(**TINY)


def load(path: Path) -> DiT:
    return load_backbone(path, num_heads=2)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("container", [None, "model", "ema"])
def test_containers_and_prefixes(model: DiT, tmp_path: Path, container: str | None, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = save_pt(tmp_path / "a.pt", state if container is None else {container: state, "step": 3})
    assert same_weights(load(path), model)
    assert stored_class(path) == "DiT"


def test_averaged_weights_are_preferred(model: DiT, tmp_path: Path) -> None:
    raw = small_dit(seed=1, **TINY).state_dict()
    path = save_pt(tmp_path / "a.pt", {"model": raw, "ema": model.state_dict(), "opt": {"lr": 1}})
    assert same_weights(load(path), model)
    path = save_pt(tmp_path / "b.pt", {"model": model.state_dict(), "ema": None})
    assert same_weights(load(path), model)


def test_a_training_checkpoint_with_its_arguments(model: DiT, tmp_path: Path) -> None:
    args = argparse.Namespace(lr=1e-4, data="somewhere")
    assert same_weights(load(save_pt(tmp_path / "a.pt", {"ema": model.state_dict(), "args": args})), model)


def test_the_format_before_torch_1_6(model: DiT, tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", model.state_dict(), _use_new_zipfile_serialization=False)
    assert same_weights(load(path), model)


def test_public_names_in_a_safetensors_file(model: DiT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert same_weights(load(tmp_path / "diffusion_pytorch_model.safetensors"), model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_prefixes_in_a_safetensors_file(model: DiT, tmp_path: Path, prefix: str) -> None:
    save_file(
        {prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "a.safetensors"
    )
    assert same_weights(load(tmp_path / "a.safetensors"), model)


def test_parameters_and_views_become_plain_separate_weights(model: DiT, tmp_path: Path) -> None:
    state: dict[str, Any] = dict(model.state_dict())
    bias = "blocks.0.mlp.fc2.bias"
    state["blocks.0.attn.proj.bias"] = state[bias]
    state["final_layer.linear.weight"] = torch.nn.Parameter(
        state["final_layer.linear.weight"].T.contiguous().T
    )
    loaded = load(save_pt(tmp_path / "a.pt", state))
    assert torch.equal(loaded.blocks[0].attn.proj.bias, loaded.blocks[0].mlp.fc2.bias)
    assert loaded.blocks[0].attn.proj.bias.data_ptr() != loaded.blocks[0].mlp.fc2.bias.data_ptr()
    assert all(parameter.is_contiguous() and parameter.requires_grad for parameter in loaded.parameters())


def test_truncated_at_any_point(model: DiT, tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", model.state_dict())
    data = path.read_bytes()
    for size in (0, 1, 30, len(data) // 3, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="truncated|empty|begins with"):
            load(path)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /nowhere/ever",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_wants_to_run_code(
    tmp_path: Path, new_format: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    path = tmp_path / "a.pt"
    torch.save({"model": Evil()}, path, _use_new_zipfile_serialization=new_format)
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(CheckpointError, match=r"needs .*\.system.*to be run.*tensors only.*if you trust"):
        load(path)
    assert not ran


def test_a_whole_model_pickled(model: DiT, tmp_path: Path) -> None:
    torch.save({"ema": torch.nn.Linear(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"needs .*torch\.nn\.modules\.linear\.Linear"):
        load(tmp_path / "a.pt")


def foreign_files(folder: Path) -> dict[str, Path]:
    files = {
        name: folder / name for name in ("text.pt", "pickle.pt", "zip.pt", "numpy.pt", "text.safetensors")
    }
    files["text.pt"].write_text("<!DOCTYPE html>")
    files["pickle.pt"].write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(files["zip.pt"], "w") as archive:
        archive.writestr("a.txt", "hello")
    np.savez(folder / "numpy.npz", a=np.zeros(3))
    (folder / "numpy.npz").rename(files["numpy.pt"])
    files["text.safetensors"].write_text("<!DOCTYPE html>")
    return files


@pytest.mark.parametrize("name", ["text.pt", "pickle.pt", "zip.pt", "numpy.pt", "text.safetensors"])
def test_foreign_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="begins with|damaged|no safetensors file"):
        load(foreign_files(tmp_path)[name])


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ([1, 2], "holds a list"),
        ({}, "a mapping of nothing"),
        ({"epoch": 3, "weights": {}}, "a mapping of 'epoch', 'weights'"),
        ({"ema": {"x_embedder.proj.weight": 3}}, "'x_embedder.proj.weight': int"),
        ({"ema": {3: torch.zeros(2)}}, "'3': Tensor"),
        ({"model": {}}, "holds no DiT: its first tensor is none"),
        ({"conv_in.weight": torch.zeros(2)}, "holds no DiT: its first tensor is conv_in.weight"),
    ],
)
def test_content_that_is_no_dit(tmp_path: Path, content: Any, seen: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=seen):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("tensor", "seen"),
    [
        (torch.zeros(16).expand(1000, 16), "fewer bytes"),
        (torch.zeros(16, 16).to_sparse(), "sparse"),
        (torch.zeros(16, 16, device="meta"), "sparse, quantized or empty"),
    ],
)
def test_tensors_that_are_not_what_they_seem(model: DiT, tmp_path: Path, tensor: Any, seen: str) -> None:
    state = {**model.state_dict(), "blocks.0.attn.proj.weight": tensor}
    with pytest.raises(CheckpointError, match=f"blocks.0.attn.proj.weight.*{seen}|{seen}"):
        load(save_pt(tmp_path / "a.pt", state))


def test_a_renamed_tensor_is_named_with_the_likely_one(model: DiT, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    state["blocks.0.attn.qvk.weight"] = state.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(CheckpointError) as caught:
        load(save_pt(tmp_path / "a.pt", state))
    assert "lacks tensor blocks.0.attn.qkv.weight and holds unknown tensor blocks.0.attn.qvk.weight" in str(
        caught.value
    )
    assert "is blocks.0.attn.qvk.weight another name" in str(caught.value)


def test_a_missing_and_a_left_over_tensor_are_named(model: DiT, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    del state["final_layer.linear.bias"]
    with pytest.raises(CheckpointError, match=r"lacks tensor final_layer\.linear\.bias"):
        load(save_pt(tmp_path / "a.pt", state))
    with pytest.raises(CheckpointError, match="unknown tensor blocks.0.extra and 1 more"):
        load(
            save_pt(
                tmp_path / "b.pt", {**model.state_dict(), "blocks.0.extra": torch.ones(1), "z": torch.ones(1)}
            )
        )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_no_float_type(model: DiT, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {**model.state_dict(), "blocks.0.mlp.fc1.weight": torch.zeros(64, 16).to(dtype)}
    with pytest.raises(
        CheckpointError, match=f"blocks.0.mlp.fc1.weight of dtype {str(dtype)[6:]}; expected one of"
    ):
        load(save_pt(tmp_path / "a.pt", state))


def test_mixed_dtypes_need_a_choice(model: DiT, tmp_path: Path) -> None:
    state = {**model.state_dict(), "blocks.0.mlp.fc1.weight": torch.zeros(64, 16, dtype=torch.float16)}
    path = save_pt(tmp_path / "a.pt", state)
    with pytest.raises(
        CheckpointError, match="fc1.weight of dtype float16; expected float32, as .*; pass dtype"
    ):
        load(path)
    loaded = load_backbone(path, num_heads=2, dtype=torch.bfloat16)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_stay_as_stored(model: DiT, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) for name, t in model.state_dict().items()}
    loaded = load(save_pt(tmp_path / "a.pt", state))
    assert {p.dtype for p in loaded.parameters()} == {dtype} and loaded.shape == model.shape
    state["pos_embed"] = state["pos_embed"].float()  # a buffer may be more precise than the weights
    assert load(save_pt(tmp_path / "b.pt", state)).pos_embed.dtype == torch.float32


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(model: DiT, tmp_path: Path, value: float) -> None:
    weight = model.state_dict()["blocks.0.mlp.fc2.weight"].clone()
    weight[3, 4] = weight[0, 0] = value
    path = save_pt(tmp_path / "a.pt", {**model.state_dict(), "blocks.0.mlp.fc2.weight": weight})
    with pytest.raises(
        CheckpointError, match=r"2 values of tensor blocks\.0\.mlp\.fc2\.weight are NaN or infinite"
    ):
        load(path)


def test_a_tensor_of_another_shape(model: DiT, tmp_path: Path) -> None:
    state = {**model.state_dict(), "blocks.0.attn.proj.weight": torch.zeros(16, 15)}
    with pytest.raises(CheckpointError, match=r"proj\.weight of shape \(16, 15\); expected \(16, 16\)"):
        load(save_pt(tmp_path / "a.pt", state))


def test_a_dydit_file_is_no_backbone(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "a.pt", public_state(small_dydit(**TINY, mixed=False)))
    assert stored_class(path) == "DyDiT"
    with pytest.raises(
        CheckpointError, match="holds a DyDiT; expected a static DiT; load it with load_dydit"
    ):
        load(path)
