"""Runs a folder written by ``dydit export --aot``; needs torch and nothing else. Copied there as ``run.py``.

    from run import Deployment
    model = Deployment(".")
    noise = model(x, t, y)  # latents (B, C, height, width), one timestep of the schedule, labels (B,)

The folder holds torch.export programs that take weights as inputs, the weights, and a schedule's masks.
A block's slices of the weights are views where they can be, else copies; they stay until the block needs
others.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
TYPES |= {"I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool, "F64": torch.float64}
Layer = tuple[Tensor, Tensor | None]  # weight and bias


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


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def check_files(folder: Path, expected: dict[str, str]) -> None:
    """Refuse files (name -> sha256) that are not those that the folder was written with."""
    for name, wanted in expected.items():
        if (seen := sha256(folder / name)) != wanted:
            raise ValueError(
                f"{folder / name} with sha256 {seen[:12]}…; expected {wanted[:12]}…, which the folder was "
                "written with; copy the folder again, or export again"
            )


def unpack_bits(rows: Tensor, count: int) -> Tensor:
    """Bytes (U, bytes), first bit highest, to masks (U, count)."""
    return (rows.unsqueeze(-1) >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1).flatten(1)[:, :count].bool()


def choose_device(wanted: str | None, made_on: str, compiled: bool) -> torch.device:
    """With its index: the wanted one; None: of the kind that the programs were made on."""
    kind = torch.device(made_on).type
    device = torch.device(wanted or kind)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device {device}; expected one that torch finds here; give device="cpu"')
    if compiled and device.type != kind:
        raise ValueError(
            f"device {device} for compiled programs; expected {kind}, which they were compiled for; "
            f"leave out compiled=True, or export on a machine for {device.type}"
        )
    return torch.empty(0, device=device).device


def is_run(index: Tensor) -> bool:
    """Whether ascending components lie side by side."""
    return len(index) > 0 and int(index[-1] - index[0]) + 1 == len(index)


def thirds(layer: Layer) -> list[Layer]:
    """The layers of q, of k and of v in one layer that has the rows of all three."""
    weight, bias = layer
    return list(zip(weight.chunk(3), [None] * 3 if bias is None else bias.chunk(3), strict=True))


def cut(layer: Layer, chosen: Tensor, components: int, dim: int) -> Layer:
    """Rows (dim 0) or columns (dim 1) of a linear layer: of its ``components``, those chosen."""

    def take(tensor: Tensor) -> Tensor:
        split = tensor.unflatten(dim, (components, -1))
        if is_run(chosen):
            part = split.narrow(dim, int(chosen[0]), len(chosen))
        else:
            part = split.index_select(dim, chosen.to(tensor.device))
        return part.flatten(dim, dim + 1)

    weight, bias = layer
    return take(weight), bias if bias is None or dim == 1 else take(bias)


class Deployment:
    """A schedule's subnetworks. Several threads may call it.

    Args:
        folder: what ``dydit export --aot`` wrote.
        device: to run on; None: the kind that the folder was made on.
        compiled: run the libraries that AOTInductor made, on the kind of machine that they were made on.
        verify: compare the sha256 of weights and schedule with those that were written.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | None = None,
        compiled: bool = False,
        verify: bool = True,
    ) -> None:
        folder = Path(folder)
        self.plan = json.loads((folder / "deployment.json").read_text())
        if verify:
            check_files(folder, self.plan["sha256"])
        self.device, self.compiled = choose_device(device, self.plan["device"], compiled), compiled
        self.weights = {
            name: tensor.to(self.device)
            for name, tensor in read_safetensors(folder / self.plan["weights"]).items()
        }
        self.masks = read_safetensors(folder / "schedule.safetensors")
        for kind, count in self.plan["components"].items():
            self.masks[kind] = unpack_bits(self.masks[kind], count)
        self.programs = {name: self._load(folder / "programs", name) for name in self.plan["programs"]}
        self.packs: dict[int, dict[str, Any]] = {}  # of each block, the last

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """Predict the noise of latents x (B, C, height, width) of classes y at one of the timesteps."""
        dtype, latent = str(x.dtype).removeprefix("torch."), list(x.shape[1:])
        if (dtype, latent) != (self.plan["dtype"], self.plan["latent"]):
            raise ValueError(
                f"latents of {dtype}, (batch, {latent}); expected {self.plan['dtype']}, (batch, "
                f"{self.plan['latent']}); convert them, or export for these"
            )
        step, steps = torch.tensor(float(t), dtype=torch.float32).item(), self.plan["timesteps"]
        if step not in steps:
            raise ValueError(
                f"timestep {t}; expected one of the folder's {len(steps)} ({steps[0]:g} … {steps[-1]:g}); "
                "export again for the sampler and number of steps that you sample with"
            )
        position, x, y = steps.index(step), x.to(self.device), y.to(self.device)
        timesteps = torch.full((len(x),), float(t), device=self.device)
        tokens, cond = self._run("embed", self.plan["embed"], x, timesteps, y)
        for i in range(len(self.plan["blocks"])):
            tokens = self._block(position, i, tokens, cond)
        return self._run("decode", self.plan["decode"], tokens, cond)

    def _block(self, position: int, i: int, tokens: Tensor, cond: Any) -> Tensor:
        block, pack = self.plan["blocks"][i], self._pack(i, int(self.masks["rows"][position, i]))
        attend = pack["attend"]
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

    def _pack(self, i: int, row: int) -> dict[str, Any]:
        """Slices of a block's weights, made where those of its last call were for another mask."""
        pack = self.packs.get(i)
        if pack is not None and pack["row"] == row:
            return pack
        del pack  # before the new ones take memory
        self.packs.pop(i, None)
        self.packs[i] = pack = {"row": row, **self._slices(row, self.plan["blocks"][i])}
        return pack

    def _slices(self, row: int, block: dict[str, Any]) -> dict[str, Any]:
        """Which program runs the attention; and of q, k, v, out, fc1 and fc2 what the mask leaves on."""
        H, G = (self.plan["components"][kind] for kind in ("head_rows", "group_rows"))
        heads, groups = (self.masks[kind][row].nonzero().squeeze(1) for kind in ("head_rows", "group_rows"))
        qkv, index, count = [self._layer(names) for names in block["qkv"]], heads, H
        attend = {0: "attend_without_heads", 1: "attend_of_one_head"}.get(len(heads), "attend")
        if len(qkv) == 1 and is_run(heads) and len(heads) < max(H, 2):  # in q, in k and in v
            qkv = thirds(qkv[0])
            attend = "attend_of_run" if len(heads) > 1 else attend
        elif len(qkv) == 1:
            index, count = torch.cat([heads, heads + H, heads + 2 * H]), 3 * H
        (out, out_bias), (fc2, fc2_bias) = (
            cut(self._layer(block[name]), chosen, components, 1)
            for name, chosen, components in (("out", heads, H), ("fc2", groups, G))
        )
        if self.compiled:  # generated code takes columns to lie as in a copy
            out, fc2 = out.contiguous(), fc2.contiguous()
        return {
            "attend": attend,
            "qkv": [cut(layer, index, count, 0) for layer in qkv if len(heads)],
            "out": (out, out_bias),
            "fc1": cut(self._layer(block["fc1"]), groups, G, 0) if len(groups) else None,
            "fc2": (fc2, fc2_bias),
        }

    def _layer(self, names: list[str | None]) -> Layer:
        return self.weights[str(names[0])], None if names[1] is None else self.weights[names[1]]

    def _run(self, program: str, weights: list[str], *inputs: Any) -> Any:
        return self.programs[program]([self.weights[name] for name in weights], *inputs)

    def _load(self, folder: Path, name: str) -> Any:
        if self.compiled:
            path, index = folder / f"{name}.compiled.pt2", self.device.index
            if not path.is_file():
                raise ValueError(
                    f"no {path}; expected compiled programs; leave out compiled=True, or export with "
                    "--aot-compile"
                )
            return torch._inductor.aoti_load_package(str(path), device_index=-1 if index is None else index)
        program = torch.export.load(folder / f"{name}.pt2")
        if self.device != torch.device(self.plan["device"]):
            program = move_to_device_pass(program, self.device)
        return program.module()
