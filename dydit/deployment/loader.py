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


def check(holds: bool, seen: str, expected: str, remedy: str) -> None:
    """Refuse what does not hold."""
    if not holds:
        raise ValueError(f"{seen}; expected {expected}; {remedy}")


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
        self.folder, self.compiled, self.sums = Path(folder), compiled, dict[str, str]()
        if verify:
            lines = self._file("SHA256SUMS").read_text().splitlines()
            self.sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        plan = self.plan = json.loads(self._file("deployment.json").read_text())
        wanted = torch.device(device or torch.device(plan["device"]).type)
        there = wanted.type != "cuda" or torch.cuda.is_available()
        check(there, f"device {wanted}", "one that torch finds here", 'give device="cpu"')
        self.device, dtype = torch.empty(0, device=wanted).device, getattr(torch, plan["dtype"])
        self.weights: dict[str, Tensor] = {}
        for file, tensors in plan["weights"].items():
            path = self._file(file)
            data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            for name, (first, last, stored, shape) in tensors.items():
                seen, expected = f"{path} ends within {name}", f"{last:,} bytes"
                check(last <= len(data), seen, expected, "copy the folder again")
                tensor = data[first:last].clone().view(getattr(torch, stored)).reshape(shape)
                self.weights[name] = tensor.to(self.device, dtype)
        self.programs = {name: self._load(f"programs/{name}") for name in plan["programs"]}
        self.packs: dict[int, Any] = {}  # of each block, the last

    def _file(self, name: str) -> Path:
        """A file of the folder; where sums are compared, the one that was written."""
        path, remedy = self.folder / name, "copy the folder again, or export again"
        there = path.is_file() and path.stat().st_size > 0
        check(there, f"no {path}, or an empty one", "a file", remedy)
        if self.sums:
            found = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    found.update(part)
            seen, expected = found.hexdigest(), self.sums.get(name, "no line of it")
            check(
                seen == expected, f"{name} with sha256 {seen[:12]}…", f"{expected[:12]}… as written", remedy
            )
        return path

    def _load(self, name: str) -> Any:
        if self.compiled:
            name, index = f"{name}.{self.device.type}.pt2", self.device.index
            remedy = "leave out compiled=True, or export with --aot-compile on such a machine"
            check((self.folder / name).is_file(), f"no {self.folder / name}", "compiled programs", remedy)
            library, index = str(self._file(name)), -1 if index is None else index
            return torch._inductor.aoti_load_package(library, device_index=index)
        program = torch.export.load(self._file(f"{name}.pt2"))
        moves = self.device != torch.device(self.plan["device"])
        return (move_to_device_pass(program, self.device) if moves else program).module()

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """Predict the noise of latents x (B, C, height, width) of classes or texts y at one of the timesteps.

        Of models that learn the variance too, that follows in C more channels.
        """
        check(not isinstance(t, Tensor) or t.numel() == 1, "several timesteps", "one", "make a call for each")
        plan, t = self.plan, torch.tensor(float(t), dtype=torch.float32).item()
        for given, (name, (dtype, *sizes)) in zip((x, y), plan["inputs"].items(), strict=True):
            seen, expected = f"{given.dtype}, {(*given.shape,)}", f"{dtype}, {(max(len(x), 1), *sizes)}"
            check(seen == expected, f"{name} of {seen}", expected, "convert them, or export for these")
        if plan["classes"] and y.device.type == "cpu":  # on a GPU it would wait for them
            first, last, most = int(y.min()), int(y.max()), plan["classes"] - 1
            remedy = "choose classes of the model"
            check(first >= 0 and last <= most, f"labels from {first} to {last}", f"0 to {most}", remedy)
        steps = plan["timesteps"]
        expected = f"one of the folder's {len(steps)} ({steps[0]:g} … {steps[-1]:g})"
        check(t in steps, f"timestep {t}", expected, "export again for the sampler and steps that you use")
        step, x, y = steps.index(t), *(given.to(self.device).contiguous() for given in (x, y))
        timesteps = x.new_full((len(x),), t, dtype=torch.float32)
        tokens, cond = self._run(plan["ends"], "embed", x, timesteps, y)
        for i, block in enumerate(plan["blocks"]):
            pack, weights = self._pack(i, plan["rows"][step][i]), block["weights"]
            tokens, m, logits = self._run(weights, pack["attend"], tokens, cond, pack["attention"])
            kept = None if logits is None else self._kept(logits, step, i)
            if kept is None or len(kept) == logits.numel():
                tokens = self._run(weights, pack["mlp_of_all"], tokens, m, pack["mlp"])
            elif len(kept):
                tokens = self._run(weights, pack["mlp_of_kept"], tokens, m, pack["mlp"], kept)
        return self._run(plan["ends"], "decode", tokens, cond)

    def _run(self, weights: dict[str, list[str]], program: str, *inputs: Any) -> Any:
        return self.programs[program]([self.weights[name] for name in weights[program]], *inputs)

    def _kept(self, logits: Tensor, step: int, i: int) -> Tensor:
        """Which tokens of the flattened batch enter the MLP."""
        if self.plan["capacities"] is None:
            return (logits.flatten() > self.plan["token_logit"]).nonzero().squeeze(1)
        (B, N), count = logits.shape, self.plan["capacities"][step][i]
        top = logits.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        return (top + N * torch.arange(B, device=self.device).unsqueeze(1)).flatten()

    def _pack(self, i: int, row: int) -> dict[str, Any]:
        """What a mask leaves on of a block's layers, made where the block's last call had another mask."""
        pack = self.packs.get(i)
        if pack is None or pack["row"] != row:
            pack = self.packs[i] = None  # the old slices go before the new ones take memory
            layers, mask = self.plan["blocks"][i]["layers"], self.plan["masks"][row]
            pack = {"row": row, **mask}
            for part in "attention", "mlp":
                pack[part] = [self._cut(*layers[layer], *cut) for layer, *cut in mask[part]]
            self.packs[i] = pack
        return pack

    def _cut(self, weight: str, bias: str | None, dim: int, runs: list[list[int]]) -> Any:
        """Weight and bias of the rows (dim 0) or columns (dim 1) in ``runs``; views where they are one."""

        def take(name: str) -> Tensor:
            parts = [self.weights[name].narrow(dim, first, count) for first, count in runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

        cut = take(weight).contiguous() if self.compiled else take(weight)  # compiled code takes them so
        return cut, None if bias is None else take(bias) if dim == 0 else self.weights[bias]
