"""Runs a folder written by ``dydit export --aot``; needs torch and nothing else. Copied there as ``run.py``.

from run import Deployment
model = Deployment(".")
noise = model(x, t, y)  # latents (B, C, height, width), one timestep of the schedule, labels (B,)
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
PARTS = ("qkv", "out", "fc")  # layers of a block


def check(holds: bool, seen: str, expected: str, remedy: str) -> None:
    """Refuse what does not hold."""
    if not holds:
        raise ValueError(f"{seen}; expected {expected}; {remedy}")


def read(path: Path, sha256: str | None = None) -> mmap.mmap:
    """A file's bytes; of the file with that sha256, where one is given."""
    remedy = "copy the folder again, or export again"
    check(path.is_file() and path.stat().st_size > 0, f"no {path}, or an empty one", "a file", remedy)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if sha256:
        seen, expected = hashlib.sha256(content).hexdigest(), f"{sha256[:12]}…, which was written"
        check(seen == sha256, f"{path} with sha256 {seen[:12]}…", expected, remedy)
    return content


def read_safetensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Name -> tensor; of the file with that sha256, where one is given."""
    content = read(path, sha256)
    start = 8 + int.from_bytes(content[:8], "little")  # length of the header, header, tensors
    data, tensors = torch.frombuffer(content, dtype=torch.uint8)[start:], {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            expected = f"{start + last:,} bytes"
            check(last <= len(data), f"{path} ends within {name}", expected, "copy the folder again")
            tensors[name] = data[first:last].clone().view(TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class Deployment:
    """A schedule's subnetworks. Several threads may call it, on a GPU those of one stream.

    Args:
        folder: what ``dydit export --aot`` wrote.
        device: to run on; None: the kind that the folder was made on.
        compiled: run the libraries that AOTInductor made, on the kind of machine that they were made on.
        verify: compare the sha256 of each file with the one that was written.
    """

    def __init__(
        self, folder: str | Path, device: str | None = None, compiled: bool = False, verify: bool = True
    ) -> None:
        folder = Path(folder)
        digest = read(folder / "deployment.sha256")[:].decode() if verify else None
        self.plan, self.compiled = json.loads(read(folder / "deployment.json", digest)[:]), compiled
        kind = torch.device(self.plan["device"]).type
        wanted = torch.device(device or kind)
        there = wanted.type != "cuda" or torch.cuda.is_available()
        check(there, f"device {wanted}", "one that torch finds here", 'give device="cpu"')
        fits, seen = wanted.type == kind or not compiled, f"device {wanted} for programs compiled for {kind}"
        check(fits, seen, kind, f"leave out compiled=True, or export on a machine for {wanted.type}")
        self.device = torch.empty(0, device=wanted).device  # with its index
        self.sha256 = self.plan["sha256"] if verify else {}
        names = *self.plan["weights"], "schedule.safetensors"
        *files, self.schedule = (read_safetensors(folder / name, self.sha256.get(name)) for name in names)
        dtype = getattr(torch, self.plan["dtype"].removeprefix("torch."))
        self.weights = {k: w.to(self.device, dtype) for file in files for k, w in file.items()}
        self.programs = {name: self._load(folder, name) for name in self.plan["programs"]}
        self.packs: dict[int, Any] = {}  # of each block, the last

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """Predict the noise of latents x (B, C, height, width) of classes or texts y at one of the timesteps.

        Of models that learn the variance too, that follows in C more channels.
        """
        check(not isinstance(t, Tensor) or t.numel() == 1, "several timesteps", "one", "make a call for each")
        plan, t = self.plan, torch.tensor(float(t), dtype=torch.float32).item()
        for given, (name, (dtype, *sizes)) in zip((x, y), plan["inputs"].items(), strict=True):
            fits, seen = [str(given.dtype), *given.shape[1:]] == [dtype, *sizes], tuple(given.shape)
            expected = f"{dtype}, (batch{''.join(f', {size}' for size in sizes)})"
            check(fits, f"{name} of {given.dtype}, {seen}", expected, "convert them, or export for these")
        check(len(y) == len(x) > 0, f"{len(y)} {name}, {len(x)} latents", "one each", "give as many of both")
        if y.device.type == "cpu" and (known := plan["labels"]):  # so many; on a GPU it would wait for them
            first, last = y.min().item(), y.max().item()
            told = f"labels from {first} to {last}", f"0 to {known - 1}", "choose classes of the model"
            check(first >= 0 and last < known, *told)
        steps = plan["timesteps"]
        expected = f"one of the folder's {len(steps)} ({steps[0]:g} … {steps[-1]:g})"
        remedy = "export again for the sampler and number of steps that you sample with"
        check(t in steps, f"timestep {t}", expected, remedy)
        # Contiguous, which compiled code takes on trust.
        position, x, y = steps.index(t), x.to(self.device).contiguous(), y.to(self.device).contiguous()
        timesteps = torch.full((len(x),), t, dtype=torch.float32, device=self.device)
        tokens, cond = self._run(plan["ends"], "embed", x, timesteps, y)
        for i, block in enumerate(plan["blocks"]):
            pack, weights = self._pack(i, int(self.schedule["rows"][position, i])), block["weights"]
            tokens, m, logits = self._run(weights, pack["attend"], tokens, cond, pack["qkv"], *pack["out"])
            kept = None if logits is None else self._kept(logits, position, i)
            if kept is None or len(kept) == logits.numel():
                tokens = self._run(weights, pack["mlp_of_all"], tokens, m, *pack["fc"])
            elif len(kept):
                tokens = self._run(weights, pack["mlp_of_kept"], tokens, m, *pack["fc"], kept)
        return self._run(plan["ends"], "decode", tokens, cond)

    def _run(self, weights: dict[str, list[str]], program: str, *inputs: Any) -> Any:
        return self.programs[program]([self.weights[name] for name in weights[program]], *inputs)

    def _kept(self, logits: Tensor, position: int, i: int) -> Tensor:
        """Which tokens of the flattened batch enter the MLP."""
        if "capacities" not in self.schedule:
            return (logits.flatten() > self.plan["token_logit"]).nonzero().squeeze(1)
        (B, N), count = logits.shape, int(self.schedule["capacities"][position, i])
        top = logits.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        return (top + N * torch.arange(B, device=self.device).unsqueeze(1)).flatten()

    def _pack(self, i: int, row: int) -> dict[str, Any]:
        """What a mask leaves on of a block's layers, made where the block's last call had another mask."""
        pack = self.packs.get(i)
        if pack is None or pack["row"] != row:
            pack = self.packs[i] = None  # the old slices go before the new ones take memory
            pack = self.packs[i] = self._slices(i, row)
        return pack

    def _slices(self, i: int, row: int) -> dict[str, Any]:
        layers, mask = self.plan["blocks"][i]["layers"], self.plan["masks"][row]
        cuts = {part: [cut and self._cut(*layers[cut[0]], *cut[1:]) for cut in mask[part]] for part in PARTS}
        return {"row": row, **mask, **cuts}

    def _cut(self, weight: str, bias: str | None, dim: int, runs: list[list[int]]) -> Any:
        """Weight and bias of the rows (dim 0) or columns (dim 1) in ``runs``; views where they are one."""

        def take(name: str) -> Tensor:
            parts = [self.weights[name].narrow(dim, first, count) for first, count in runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

        cut = take(weight).contiguous() if self.compiled else take(weight)  # compiled code takes them so
        return cut, None if bias is None else take(bias) if dim == 0 else self.weights[bias]

    def _load(self, folder: Path, name: str) -> Any:
        file = f"programs/{name}{'.compiled' if self.compiled else ''}.pt2"
        path, index = folder / file, self.device.index
        if self.compiled:
            remedy = "leave out compiled=True, or export with --aot-compile"
            check(path.is_file(), f"no {path}", "compiled programs", remedy)
        content = read(path, self.sha256.get(file))
        if self.compiled:
            return torch._inductor.aoti_load_package(str(path), device_index=-1 if index is None else index)
        program = torch.export.load(io.BytesIO(content))
        if self.device != torch.device(self.plan["device"]):
            program = move_to_device_pass(program, self.device)
        return program.module()
