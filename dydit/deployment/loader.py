"""Runs a folder written by ``dydit export --aot``; needs torch and nothing else. Copied there as ``run.py``.

from run import Deployment
model = Deployment(".")
noise = model(x, t, y)  # latents (B, C, height, width), one timestep of the schedule, labels (B,)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def refusal(seen: str, expected: str, remedy: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"{seen}; expected {expected}; {remedy}")


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def read_safetensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Name -> tensor; of the file with that sha256, where one is given."""
    if sha256 and (seen := sha256_of(path)) != sha256:
        expected = f"{sha256[:12]}…, which the folder was written with"
        raise refusal(f"{path} with sha256 {seen[:12]}…", expected, "copy the folder again, or export again")
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(content[:8].tolist(), "little")  # length of the header, header, tensors
    tensors = {}
    for name, entry in json.loads(bytes(content[8:start].tolist())).items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            if last > len(content):
                raise refusal(f"{path} ends within {name}", f"{last:,} bytes", "copy the folder again")
            tensors[name] = content[first:last].clone().view(TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class Deployment:
    """A schedule's subnetworks. Several threads may call it.

    Args:
        folder: what ``dydit export --aot`` wrote.
        device: to run on; None: the kind that the folder was made on.
        compiled: run the libraries that AOTInductor made, on the kind of machine that they were made on.
        verify: compare the sha256 of weights and schedule with those that were written.
    """

    def __init__(
        self, folder: str | Path, device: str | None = None, compiled: bool = False, verify: bool = True
    ) -> None:
        folder = Path(folder)
        self.plan, self.compiled = json.loads((folder / "deployment.json").read_text()), compiled
        kind = torch.device(self.plan["device"]).type
        wanted = torch.device(device or kind)
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise refusal(f"device {wanted}", "one that torch finds here", 'give device="cpu"')
        if compiled and wanted.type != kind:
            remedy = f"leave out compiled=True, or export on a machine for {wanted.type}"
            raise refusal(f"device {wanted} for programs compiled for {kind}", kind, remedy)
        self.device = torch.empty(0, device=wanted).device  # with its index
        expected = self.plan["sha256"] if verify else {}
        weights, self.schedule = (
            read_safetensors(folder / name, expected.get(name))
            for name in (self.plan["weights"], "schedule.safetensors")
        )
        self.weights = {name: tensor.to(self.device) for name, tensor in weights.items()}
        self.programs = {name: self._load(folder / "programs" / name) for name in self.plan["programs"]}
        self.packs: dict[int, Any] = {}  # of each block, the last

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """Predict the noise of latents x (B, C, height, width) of classes y at one of the timesteps.

        Of models that learn the variance too, that follows in C more channels.
        """
        plan, step = self.plan, torch.tensor(float(t), dtype=torch.float32).item()
        dtype, latent, steps = plan["dtype"], plan["latent"], plan["timesteps"]
        if (str(x.dtype), list(x.shape[1:])) != (dtype, latent):
            remedy = "convert them, or export for these"
            expected = f"{dtype}, (batch, {', '.join(map(str, latent))})"
            raise refusal(f"latents of {x.dtype}, {tuple(x.shape)}", expected, remedy)
        if step not in steps:
            expected = f"one of the folder's {len(steps)} ({steps[0]:g} … {steps[-1]:g})"
            remedy = "export again for the sampler and number of steps that you sample with"
            raise refusal(f"timestep {t}", expected, remedy)
        position, x, y = steps.index(step), x.to(self.device), y.to(self.device)
        timesteps = torch.full((len(x),), float(t), device=self.device)
        tokens, cond = self._run(plan["ends"], "embed", x, timesteps, y)
        for i in range(len(plan["blocks"])):
            tokens = self._block(position, i, tokens, cond)
        return self._run(plan["ends"], "decode", tokens, cond)

    def _block(self, position: int, i: int, tokens: Tensor, cond: Any) -> Tensor:
        weights, row = self.plan["blocks"][i]["weights"], int(self.schedule["rows"][position, i])
        pack = self._pack(i, row)
        inputs = (tokens, cond, pack["qkv"], pack["out"])
        tokens, modulation, logits = self._run(weights, pack["attend"], *inputs)
        inputs, suffix = (tokens, modulation, pack["fc1"], pack["fc2"]), pack["mlp"]
        kept = None if logits is None else self._kept(position, i, logits)
        if kept is None or len(kept) == logits.numel():
            return self._run(weights, "mlp_of_all" + suffix, *inputs)
        return self._run(weights, "mlp_of_kept" + suffix, *inputs, kept) if len(kept) else tokens

    def _kept(self, position: int, i: int, logits: Tensor) -> Tensor:
        """Which tokens of the flattened batch enter the MLP."""
        if "capacities" not in self.schedule:
            return (logits.flatten() > self.plan["token_logit"]).nonzero().squeeze(1)
        (B, N), count = logits.shape, int(self.schedule["capacities"][position, i])
        top = logits.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        return (top + N * torch.arange(B, device=self.device).unsqueeze(1)).flatten()

    def _pack(self, i: int, row: int) -> Any:
        """What the mask leaves on of a block's layers, made where its last call had another mask."""
        pack = self.packs.get(i)
        if pack is None or pack["row"] != row:
            pack = self.packs[i] = None  # the old slices go before the new ones take memory
            pack = self.packs[i] = self._slices(i, row)
        return pack

    def _slices(self, i: int, row: int) -> Any:
        layers, mask = self.plan["blocks"][i]["layers"], self.plan["masks"][row]
        return {
            "row": row,
            "attend": mask["attend"],
            "mlp": mask["mlp"],
            "qkv": [self._cut(layers["qkv"][layer], runs, 0) for layer, runs in mask["qkv"]],
            "out": self._cut(layers["out"], mask["out"], 1),
            "fc1": self._cut(layers["fc1"], mask["fc1"], 0) if mask["fc1"] else None,
            "fc2": self._cut(layers["fc2"], mask["fc2"], 1),
        }

    def _cut(self, layer: list[str | None], runs: list[list[int]], dim: int) -> Any:
        """Weight and bias of the rows (dim 0) or columns (dim 1) in ``runs``; views where they are one."""

        def take(tensor: Tensor) -> Tensor:
            parts = [tensor.narrow(dim, first, count) for first, count in runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

        weight, bias = (None if name is None else self.weights[name] for name in layer)
        assert weight is not None
        weight, bias = take(weight), bias if dim == 1 or bias is None else take(bias)
        if self.compiled:  # generated code takes columns to lie as in a copy
            weight = weight.contiguous()
        return weight, bias

    def _run(self, weights: dict[str, list[str]], program: str, *inputs: Any) -> Any:
        return self.programs[program]([self.weights[name] for name in weights[program]], *inputs)

    def _load(self, path: Path) -> Any:
        if self.compiled:
            path, index = path.with_name(f"{path.name}.compiled.pt2"), self.device.index
            if not path.is_file():
                remedy = "leave out compiled=True, or export with --aot-compile"
                raise refusal(f"no {path}", "compiled programs", remedy)
            return torch._inductor.aoti_load_package(str(path), device_index=-1 if index is None else index)
        program = torch.export.load(path.with_name(f"{path.name}.pt2"))
        if self.device != torch.device(self.plan["device"]):
            program = move_to_device_pass(program, self.device)
        return program.module()
