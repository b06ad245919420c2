"""The torch.export programs of a schedule's subnetworks.

Numbers of samples, heads, groups and tokens are symbolic sizes: one program per stage serves every distinct
shape of every block and timestep. Only blocks with one head, without any head or without any group have
programs of their own, as they have other operations or, of one head, other strides; and, where a model fuses
q, k and v, blocks whose heads lie side by side, as they take three views and no copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dydit.adapters.base import AttentionParts, MlpParts
from dydit.deployment.slices import attention_program, is_fused
from dydit.deployment.stages import Fields, Stage, Stages, used_weights
from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule
from dydit.models.embeddings import batch_timesteps
from dydit.runtime.packing import Weights

_SAMPLES = 3  # of the example inputs: programs take any number


@dataclass
class Programs:
    """What ``dydit.deployment.loader`` runs.

    Attributes:
        programs: by name of the stage.
        inputs: dtype and sizes of one sample, by name, of what a call gives besides the timestep.
        ends: embed and decode -> names of the weights that those programs take first.
        blocks: of each block, stage -> names of the weights that its program takes first.
    """

    programs: dict[str, ExportedProgram] = field(default_factory=dict)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    ends: dict[str, list[str]] = field(default_factory=dict)
    blocks: list[dict[str, list[str]]] = field(default_factory=list)


def export_programs(model: DyDiT, schedule: SubnetSchedule) -> Programs:
    """Trace the stages of ``model`` that the schedule needs, on the model's device and in its dtype."""
    return _Exporter(model, schedule).run()


class _Exporter:
    """Runs the model stage by stage on example inputs, and exports each stage where it first comes."""

    def __init__(self, model: DyDiT, schedule: SubnetSchedule) -> None:
        self.model, self.result, self.state = model, Programs(), model.state_dict()
        self.x, self.t, self.y = _example(model, schedule.timesteps[0])
        groups = schedule.group_rows.sum(-1)
        # Of any heads always, the others where the schedule has such blocks.
        fused = is_fused(model)
        of_heads = {attention_program(heads, fused) for heads in schedule.head_rows}
        self.attends = sorted({"attend", *of_heads})
        # Some groups always; none where the schedule has such blocks.
        self.has_groups = sorted({True, *map(bool, groups)}, reverse=True)

    @torch.no_grad()
    def run(self) -> Programs:
        """Export them all."""
        given = {"latents": self.x, "texts" if self.model.shape.takes_text else "labels": self.y}
        self.result.inputs = {name: [str(one.dtype), *one.shape[1:]] for name, one in given.items()}
        inputs: tuple[Any, ...] = (self.x, self.t, self.y)
        cond = self.model.adapter.condition(self.model.backbone, self.t, self.y)
        stages = Stages(self.model, type(cond))
        ends = self.result.ends
        ends["embed"], (tokens, fields) = self._export("embed", stages.embed, inputs, (_BATCH,) * 3)
        for i in range(self.model.shape.depth):
            self.result.blocks.append(self._block(stages, i, tokens, fields))
        inputs, sizes = (tokens, fields), (_BATCH, dict.fromkeys(fields, _BATCH))
        ends["decode"], _ = self._export("decode", stages.decode, inputs, sizes)
        return self.result

    def _block(self, stages: Stages, i: int, tokens: Tensor, cond: Fields) -> dict[str, list[str]]:
        adapter = self.model.adapter
        block = adapter.blocks(self.model.backbone)[i]
        attention, mlp = adapter.attention(block), adapter.mlp(block)
        names: dict[str, list[str]] = {}
        every_cond = dict.fromkeys(cond, _BATCH)
        for name in self.attends:
            *qkv, out = _example_attention(attention, name)
            inputs: tuple[Any, ...] = (tokens, cond, [*qkv, out])
            any_number = name in ("attend", "attend_of_run")
            rows, columns = (_ROWS, _COLUMNS) if any_number else (_FIXED, _FIXED)
            sizes: tuple[Any, ...] = (_BATCH, every_cond, [*[rows] * len(qkv), columns])
            names[name], (x, m, logits) = self._export(name, stages.attend(i), inputs, sizes)
        every_m = [None if row is None else _BATCH for row in m]
        for some in self.has_groups:
            inputs = (x, m, _example_mlp(mlp, some))
            sizes = (_BATCH, every_m, [_ROWS, _COLUMNS] if some else [_FIXED])
            suffix = "" if some else "_without_groups"
            name = f"mlp_of_all{suffix}"
            names[name], _ = self._export(name, stages.mlp_of_all(i), inputs, sizes)
            if logits is not None:
                name = f"mlp_of_kept{suffix}"
                kept = torch.arange(0, logits.numel(), 2, device=x.device)
                names[name], _ = self._export(name, stages.mlp_of_kept(i), (*inputs, kept), (*sizes, _BATCH))
        return names

    def _export(
        self, name: str, function: Callable[..., Any], inputs: tuple[Any, ...], sizes: tuple[Any, ...]
    ) -> tuple[list[str], Any]:
        """Names of the weights that a stage takes, and its output; exported the first time."""
        names, output = used_weights(self.model, function, *inputs)
        weights = [self.state[key] for key in names]
        if name not in self.result.programs:
            # Sizes of 1 are like any other: one sample, one head, one token.
            with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
                self.result.programs[name] = torch.export.export(
                    Stage(self.model, function, names),
                    (weights, *inputs),
                    dynamic_shapes={"weights": [None] * len(names), "inputs": sizes},
                )
        return names, output


# Which dimensions are symbolic sizes: of per-sample tensors, and of a linear layer's weight and bias.
_BATCH = {0: Dim.DYNAMIC}
_ROWS, _COLUMNS, _FIXED = (_BATCH, _BATCH), ({1: Dim.DYNAMIC}, None), (None, None)


def _example(model: DyDiT, timestep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels of a few samples."""
    shape, weight = model.shape, next(model.parameters())
    x = weight.new_zeros(_SAMPLES, shape.in_channels, *shape.sample_size)
    t = batch_timesteps(timestep, x)
    if shape.takes_text:
        return x, t, x.new_zeros(_SAMPLES, shape.context_length, shape.context_dim)
    return x, t, torch.zeros(_SAMPLES, dtype=torch.int64, device=x.device)


def _example_attention(parts: AttentionParts, name: str) -> list[Weights]:
    """Weights of most heads, of one, or of none: only their shapes count, and how many layers they are."""
    width, H = parts.out.in_features, parts.num_heads
    heads = {"attend_without_heads": 0, "attend_of_one_head": 1}.get(name, H - 1 if H > 2 else H)
    size = width // H * heads
    layers: list[Weights] = [(layer.weight, layer.bias) for layer in parts.qkv]
    if len(layers) == 1 and name != "attend":
        weight, bias = layers[0]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        layers = list(zip(weight.chunk(3), biases, strict=True))
    count = size * 3 // len(layers)
    qkv = [(w[:count], None if b is None else b[:count]) for w, b in layers if size]
    return [*qkv, (parts.out.weight[:, :size].contiguous(), parts.out.bias)]


def _example_mlp(parts: MlpParts, some: bool) -> list[Weights]:
    """Weights of most groups, or of none."""
    size = parts.fc1.out_features // 2 if some else 0
    fc2 = parts.fc2.weight[:, :size].contiguous(), parts.fc2.bias
    return [_rows(parts.fc1, size), fc2] if some else [fc2]


def _rows(layer: nn.Linear, size: int) -> Weights:
    return layer.weight[:size], None if layer.bias is None else layer.bias[:size]
