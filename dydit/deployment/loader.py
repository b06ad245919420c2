"""Runs a folder written by ``dydit export --aot``; needs torch and nothing else. Copied there as ``run.py``.

    from run import Deployment
    model = Deployment(".")
    noise = model(x, t, y)  # latents (B, C, height, width), one timestep of the schedule, labels (B,)

The folder holds torch.export programs that take weights as inputs, the weights, and a schedule's masks.
A timestep's slices of the weights are made when it first comes, and kept up to ``budget`` bytes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
TYPES |= {"I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool, "F64": torch.float64}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor. (The format: length of a JSON header, the header, the bytes.)"""
    tensors = {}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            content = bytearray(last - first)
            file.seek(start + first)
            if file.readinto(content) < len(content):
                raise EOFError(f"{path} ends within {name}: copy the folder again")
            dtype = TYPES[entry["dtype"]]
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def unpack_bits(rows: Tensor, count: int) -> Tensor:
    """Bytes (U, bytes), first bit highest, to masks (U, count)."""
    return (rows.unsqueeze(-1) >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1).flatten(1)[:, :count].bool()


def take(tensor: Tensor, index: Tensor, components: int, dim: int) -> Tensor:
    """The components at ``index``, of all that lie along ``dim``."""
    if len(index) == components:
        return tensor
    return tensor.unflatten(dim, (components, -1)).index_select(dim, index).flatten(dim, dim + 1)


class Deployment:
    """A schedule's subnetworks.

    Args:
        folder: what ``dydit export --aot`` wrote.
        device: to run on.
        compiled: run the libraries that AOTInductor made, on the kind of machine that they were made on.
        budget: bytes of sliced weights to keep; None: as many as the weights have.
    """

    def __init__(
        self, folder: str | Path, device: str = "cpu", compiled: bool = False, budget: int | None = None
    ) -> None:
        folder = Path(folder)
        self.plan = json.loads((folder / "deployment.json").read_text())
        self.device = torch.device(device)
        self.weights = {
            name: tensor.to(self.device)
            for name, tensor in read_safetensors(folder / self.plan["weights"]).items()
        }
        self.masks = read_safetensors(folder / "schedule.safetensors")
        for kind, count in self.plan["components"].items():
            self.masks[kind] = unpack_bits(self.masks[kind], count)
        self.programs = {
            name: self._load(folder / "programs", name, compiled) for name in self.plan["programs"]
        }
        self.packs: OrderedDict[tuple[int, int], dict[str, Any]] = OrderedDict()
        self.budget = sum(w.nbytes for w in self.weights.values()) if budget is None else budget

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """Predict the noise of latents x (B, C, height, width) of classes y at one of the timesteps."""
        step = torch.tensor(float(t), dtype=torch.float32).item()
        if step not in self.plan["timesteps"]:
            raise ValueError(f"timestep {t}; the folder holds {', '.join(map(str, self.plan['timesteps']))}")
        position = self.plan["timesteps"].index(step)
        timesteps = torch.full((len(x),), float(t), device=self.device)
        tokens, cond = self._run("embed", self.plan["embed"], x, timesteps, y)
        for i, block in enumerate(self.plan["blocks"]):
            tokens = self._block(position, i, block, tokens, cond)
        return self._run("decode", self.plan["decode"], tokens, cond)

    def _block(self, position: int, i: int, block: dict[str, Any], tokens: Tensor, cond: Any) -> Tensor:
        pack = self._pack(i, int(self.masks["rows"][position, i]), block)
        attend = {0: "attend_without_heads", 1: "attend_of_one_head"}.get(pack["heads"], "attend")
        tokens, modulation, logits = self._run(attend, block[attend], tokens, cond, pack["qkv"], pack["out"])
        rows = None if logits is None else self._rows(position, i, logits)
        mlp = "mlp_of_all" if rows is None else "mlp_of_kept"
        mlp += "" if pack["fc1"] else "_without_groups"
        if rows is None:
            return self._run(mlp, block[mlp], tokens, modulation, pack["fc1"], pack["fc2"])
        if not len(rows):
            return tokens
        return self._run(mlp, block[mlp], tokens, modulation, pack["fc1"], pack["fc2"], rows)

    def _rows(self, position: int, i: int, logits: Tensor) -> Tensor | None:
        """Which tokens of the flattened batch enter the MLP; None: all."""
        B, N = logits.shape
        if "capacities" in self.masks:
            k = int(self.masks["capacities"][position, i])
            top = logits.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
            rows = (top + N * torch.arange(B, device=self.device).unsqueeze(1)).flatten()
        else:
            rows = (logits.flatten() > self.plan["token_logit"]).nonzero().squeeze(1)
        return None if len(rows) == B * N else rows

    def _pack(self, i: int, row: int, block: dict[str, Any]) -> dict[str, Any]:
        """Slices of a block's weights."""
        if (i, row) not in self.packs:
            self.packs[i, row] = self._slice(row, block)
            while sum(pack["bytes"] for pack in self.packs.values()) > self.budget and len(self.packs) > 1:
                self.packs.popitem(last=False)
        self.packs.move_to_end((i, row))
        return self.packs[i, row]

    def _slice(self, row: int, block: dict[str, Any]) -> dict[str, Any]:
        H, G = (self.plan["components"][kind] for kind in ("head_rows", "group_rows"))
        heads = self.masks["head_rows"][row].nonzero().squeeze(1).to(self.device)
        groups = self.masks["group_rows"][row].nonzero().squeeze(1).to(self.device)
        fused = len(block["qkv"]) == 1  # rows of q, then k, then v
        rows = torch.cat([heads, heads + H, heads + 2 * H]) if fused else heads
        pack: dict[str, Any] = {
            "heads": len(heads),
            "qkv": [
                self._layer(layer, rows, 3 * H if fused else H, 0) for layer in block["qkv"] if len(heads)
            ],
            "out": self._layer(block["out"], heads, H, 1),
            "fc1": self._layer(block["fc1"], groups, G, 0) if len(groups) else None,
            "fc2": self._layer(block["fc2"], groups, G, 1),
        }
        layers = [*pack["qkv"], pack["out"], pack["fc1"] or [], pack["fc2"]]
        return {**pack, "bytes": sum(t.nbytes for layer in layers for t in layer if t is not None)}

    def _layer(
        self, names: list[str | None], index: Tensor, components: int, dim: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a linear layer with some of its rows (dim 0) or columns (dim 1)."""
        weight, bias = self.weights[str(names[0])], None if names[1] is None else self.weights[names[1]]
        sliced = bias if bias is None or dim == 1 else take(bias, index, components, 0)
        return take(weight, index, components, dim), sliced

    def _run(self, program: str, weights: list[str], *inputs: Any) -> Any:
        return self.programs[program]([self.weights[name] for name in weights], *inputs)

    def _load(self, folder: Path, name: str, compiled: bool) -> Any:
        if compiled:
            return torch._inductor.aoti_load_package(str(folder / f"{name}.compiled.pt2"))
        program = torch.export.load(folder / f"{name}.pt2")
        if self.device.type != self.plan["device"]:
            program = move_to_device_pass(program, self.device)
        return program.module()
