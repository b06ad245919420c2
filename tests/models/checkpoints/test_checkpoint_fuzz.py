"""Whatever is done to a valid file, loading answers with a model or a ``DyditError``."""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import TINY, WEIGHTS, small_diffusers
from core_builders import small_dit, small_dydit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dydit.dynamic.loading import load_dydit, public_state
from dydit.errors import DyditError
from dydit.models.loading import load_backbone

EXAMPLES = settings(max_examples=4 * settings.default.max_examples)
Load = Callable[[Path], Any]


def _pt(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _load_static(path: Path) -> Any:
    return load_backbone(path, num_heads=2)


def _load_dynamic(path: Path) -> Any:
    return load_dydit(path, num_heads=2)


STATIC = dict(small_dit(**TINY).state_dict())
DYNAMIC = public_state(small_dydit(mixed=False, **TINY))
FILES: dict[str, tuple[bytes, Load]] = {
    "static": (_pt({"ema": STATIC, "step": 1}), _load_static),
    "old format": (_pt(STATIC, _use_new_zipfile_serialization=False), _load_static),
    "dynamic": (_pt(DYNAMIC), _load_dynamic),
}
DIFFUSERS = {"num_attention_heads": 2, "num_layers": 1, "sample_size": 4, "num_embeds_ada_norm": 3}
FOLDERS: dict[str, tuple[Any, Load]] = {
    "static": (small_dit(**TINY), load_backbone),
    "dynamic": (small_dydit(mixed=False, **TINY), load_dydit),
    "diffusers": (small_diffusers(**DIFFUSERS), load_backbone),
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def folders(place: Path) -> dict[str, Path]:
    for name, (model, _) in FOLDERS.items():
        model.save_pretrained(place / name)
    return {name: place / name for name in FOLDERS}


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes flipped, put in or taken out, near both ends more often, where files keep their structure."""
    if draw(st.integers(0, 4)) == 0:
        return data[: draw(st.integers(0, len(data) - 1))]
    changed = bytearray(data)
    near_end = st.integers(0, min(4000, len(data) - 1))
    where = st.one_of(near_end, near_end.map(lambda i: len(data) - 1 - i), st.integers(0, len(data) - 1))
    for _ in range(draw(st.integers(1, 8))):
        at = min(draw(where), len(changed) - 1)
        operation = draw(st.sampled_from(("flip", "flip", "set", "insert", "delete")))
        if operation == "flip":
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif operation == "set":
            changed[at] = draw(st.integers(0, 255))
        elif operation == "insert":
            changed.insert(at, draw(st.integers(0, 255)))
        else:
            del changed[at]
    return bytes(changed)


TENSORS = st.sampled_from((
    torch.zeros(()), torch.zeros(0), torch.zeros(16, 0), torch.zeros(1, 1), torch.zeros(16, 16),
    torch.zeros(1, 4, 16), torch.zeros(16, 3, 2, 2), torch.full((96, 16), torch.nan),
    torch.full((16,), torch.inf), torch.zeros(16, dtype=torch.int32),
    torch.zeros(16, 16, dtype=torch.bool), torch.zeros(16, dtype=torch.float64),
))  # fmt: skip
NAMES = st.sampled_from((
    "blocks.0.x", "blocks.1.attn.qkv.weight", "blocks.00.attn.qkv.weight", "blocks.999999.a",
    "blocks.9999999.a", "", ".", "é", "blocks.0.attn_rate.router.weight", "pos_embed.weight", "module.x",
    "x" * 300, "{rest}", "blocks.-1.a",
))  # fmt: skip


@st.composite
def rearranged(draw: st.DrawFn, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with tensors renamed, dropped, added, reshaped, converted or replaced."""
    state = dict(state)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(state)))
        tensor = state[name]
        change = draw(st.sampled_from(("rename", "drop", "add", "reshape", "convert", "replace")))
        if change == "rename":
            state[draw(st.one_of(NAMES, st.sampled_from(sorted(state))))] = state.pop(name)
        elif change == "drop" and len(state) > 1:
            del state[name]
        elif change == "add":
            state[draw(NAMES)] = draw(TENSORS).clone()
        elif change == "reshape":
            shapes = (
                tensor.flatten(),
                tensor[None],
                tensor.flatten()[:-1],
                tensor.reshape(1, -1),
                tensor.permute(tuple(range(tensor.ndim))[::-1]),
            )
            state[name] = draw(st.sampled_from(shapes)).contiguous()
        elif change == "convert":
            state[name] = tensor.to(
                draw(st.sampled_from((torch.float16, torch.float64, torch.int8, torch.bool)))
            )
        else:
            state[name] = draw(TENSORS).clone()
    return state


VALUES = st.sampled_from((
    None, True, False, 0, -1, 1, 3, 7, 10**9, 10**30, 0.5, 1e300, float("nan"), float("inf"), "", "DiT",
    "adaln", [], [4], [4, 4], [4, "4"], [4, 4, 4], {}, {"depth": 1}, 2**31, 2**63,
))  # fmt: skip


@st.composite
def altered(draw: st.DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    """A config with settings changed, dropped or added, at any depth."""
    config = json.loads(json.dumps(config))
    for _ in range(draw(st.integers(1, 2))):
        section = config
        key = draw(st.sampled_from(sorted(section)))
        while isinstance(section[key], dict) and section[key] and draw(st.booleans()):
            section = section[key]
            key = draw(st.sampled_from(sorted(section)))
        change = draw(st.sampled_from(("set", "set", "set", "drop", "add")))
        if change == "drop" and len(section) > 1:
            del section[key]
        elif change == "add":
            section[key + "x"] = copy.deepcopy(draw(VALUES))
        else:
            section[key] = copy.deepcopy(draw(VALUES))
    return config


def load_or_refuse(load: Load, path: Path) -> None:
    try:
        model = load(path)
    except DyditError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    assert all(tensor.isfinite().all() and not tensor.is_meta for tensor in model.state_dict().values())


@EXAMPLES
@given(data=st.data(), kind=st.sampled_from(sorted(FILES)))
def test_bytes_of_a_torch_file(place: Path, data: st.DataObject, kind: str) -> None:
    content, load = FILES[kind]
    (place / "a.pt").write_bytes(data.draw(damaged(content)))
    load_or_refuse(load, place / "a.pt")


@EXAMPLES
@given(data=st.data(), kind=st.sampled_from(("static", "dynamic")))
def test_tensors_of_a_torch_file(place: Path, data: st.DataObject, kind: str) -> None:
    state = data.draw(rearranged(STATIC if kind == "static" else DYNAMIC))
    torch.save(state, place / "a.pt")
    load_or_refuse(FILES[kind][1], place / "a.pt")


@EXAMPLES
@given(data=st.data(), kind=st.sampled_from(sorted(FOLDERS)))
def test_bytes_of_a_folders_weights(folders: dict[str, Path], data: st.DataObject, kind: str) -> None:
    weights = folders[kind] / WEIGHTS
    content = weights.read_bytes()
    try:
        weights.write_bytes(data.draw(damaged(content)))
        load_or_refuse(FOLDERS[kind][1], folders[kind])
    finally:
        weights.write_bytes(content)


@EXAMPLES
@given(data=st.data(), kind=st.sampled_from(sorted(FOLDERS)))
def test_tensors_of_a_folder(folders: dict[str, Path], data: st.DataObject, kind: str) -> None:
    weights = folders[kind] / WEIGHTS
    content = weights.read_bytes()
    try:
        save_file(data.draw(rearranged(FOLDERS[kind][0].state_dict())), weights)
        load_or_refuse(FOLDERS[kind][1], folders[kind])
    finally:
        weights.write_bytes(content)


@EXAMPLES
@given(data=st.data(), kind=st.sampled_from(sorted(FOLDERS)))
def test_a_folders_config(folders: dict[str, Path], data: st.DataObject, kind: str) -> None:
    config = folders[kind] / "config.json"
    content = config.read_bytes()
    try:
        if data.draw(st.integers(0, 3)):
            config.write_text(json.dumps(data.draw(altered(json.loads(content)))))
        else:
            config.write_bytes(data.draw(damaged(content)))
        load_or_refuse(FOLDERS[kind][1], folders[kind])
    finally:
        config.write_bytes(content)
