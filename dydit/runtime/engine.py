"""SubnetEngine: the same call as the model, executed with sliced weights and gathered tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dydit.costs import ATTENTION_PROJECTIONS, MLP, MODULATION_ROWS
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError, ScheduleError, ShapeError
from dydit.export.fingerprint import weights_sha256
from dydit.export.schedule import SubnetSchedule
from dydit.guidance import Denoiser, forward_with_cfg
from dydit.models.blocks import Conditioning, Modulation
from dydit.models.embeddings import batch_timesteps, check_per_sample
from dydit.precision import converted_copy
from dydit.runtime.ahead import Ahead, conditioned_ahead
from dydit.runtime.compiled import compiled_stages
from dydit.runtime.graphs import CudaGraphs
from dydit.runtime.inputs import check_inputs
from dydit.runtime.on_cpu import BlockOnCpu
from dydit.runtime.packs import PackStatistics, SchedulePacks
from dydit.runtime.sliced import STAGES, SlicedBlock, Stages, filled_up
from dydit.runtime.subnetwork import BlockAtTimestep, Subnetwork
from dydit.runtime.workspace import Workspaces

Mode = Literal["exact", "capacity"]
RUNS_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SubnetEngine(nn.Module):
    """Runs the subnetworks of a schedule. Never multiplies by a mask.

    The weights are sliced when a subnetwork is first used, and kept under ``memory_budget``. Several threads
    may call one engine. The model's weights must not change while an engine uses them: ``load_state_dict``
    is refused with a ``ScheduleError``.

    Args:
        model: the DyDiT that the schedule was exported from.
        schedule: its subnetworks.
        dtype: run in this dtype, on a converted copy of the model; None = the model's own.
        memory_budget: bytes of packed weights to keep; None = one more copy of the block weights.
        verify: compare the sha256 of the model's weights with the schedule's.
        mode: ``exact`` runs the MLP on the tokens whose score is above the threshold, however many they
            are; ``capacity`` on the fixed number per timestep and block that calibration chose, highest
            scores first: nothing then depends on the data but which tokens they are.
        compile: run the blocks through torch.compile. The first calls take longer, by seconds for each of a
            few graphs; timesteps and blocks share them. On a GPU, in capacity mode and with a budget for the
            slices of the whole schedule, each timestep's kernels are also recorded as one CUDA graph.

    Raises:
        ScheduleError: the schedule belongs to other weights, or has no capacities.
        ConfigError: the budget is smaller than one block, or there is no such mode or dtype.
    """

    def __init__(
        self,
        model: DyDiT,
        schedule: SubnetSchedule,
        dtype: torch.dtype | None = None,
        memory_budget: float | None = None,
        verify: bool = True,
        mode: Mode = "exact",
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_mode(mode, schedule)
        if dtype not in (None, *RUNS_IN):
            raise ConfigError(
                f"an engine in {dtype}", expected=", ".join(map(str, RUNS_IN)), remedy="choose one of these"
            )
        if verify:
            _check_weights(model, schedule)
        if dtype is not None and dtype != next(model.parameters()).dtype:
            model = converted_copy(model, dtype)
        self.model, self.schedule, self.shape, self.mode = model, schedule, schedule.shape, mode
        adapter = model.adapter
        blocks = adapter.blocks(model.backbone)
        weights = [(adapter.attention(block), adapter.mlp(block)) for block in blocks]
        self._packs = SchedulePacks(weights, schedule, memory_budget)
        self._compile, self._graphs, self._workspaces = compile, CudaGraphs(), Workspaces()
        sliced = [*self._sliced_blocks(compiled_stages() if compile else STAGES)]
        self.blocks, self._blocks_on_cpu = nn.ModuleList(sliced), [BlockOnCpu(block) for block in sliced]
        self.register_load_state_dict_pre_hook(_take_no_weights)

    @property
    def null_label(self) -> int | Tensor | None:
        """What guidance gives in the place of a label (see ``DiT.null_label``)."""
        return self.model.null_label

    @torch.compiler.disable  # it compiles its own stages; slices come and go between them
    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        """Predict the noise of latents x (B, C, height, width) as the model in evaluation does.

        Args:
            x, y: as for the model.
            t: timesteps (B,), or one number for the whole batch; each must be in the schedule. Samples of
                different timesteps run in one subnetwork each. A tensor on an accelerator costs one sync:
                pass a number where all samples share the timestep.

        Returns:
            (B, C, height, width), or with ``learn_sigma`` (B, 2C, height, width): noise, then variance.

        Raises:
            ScheduleError: a timestep is not in the schedule.
            ShapeError: latent or y of the wrong shape, dtype or device, or t or y not one per sample.
            ConfigError: it is being exported.
        """
        if torch.compiler.is_exporting():
            raise ConfigError(
                "an engine in torch.export",
                expected="one graph, which a timestep's subnetwork is",
                remedy="export engine.subnetwork(t), or use dydit export --aot",
            )
        check_inputs(x, y, self.shape, next(self.model.parameters()))
        if not isinstance(t, Tensor) or t.ndim == 0:
            return self._run(self.schedule.index_of(float(t)), x, t, y)
        check_per_sample("timesteps", t, len(x))
        if y.shape[:1] != x.shape[:1]:
            raise ShapeError(
                f"labels of shape {tuple(y.shape)} for {len(x)} latents",
                expected="one per sample",
                remedy="give as many labels as latents",
            )
        steps = t.tolist()
        if len(set(steps)) == 1:
            return self._run(self.schedule.index_of(steps[0]), x, t, y)
        output = None
        for step in sorted(set(steps)):
            position = self.schedule.index_of(step)
            rows = torch.tensor([i for i, s in enumerate(steps) if s == step], device=x.device)
            part = self._run(position, x[rows], t[rows.to(t.device)], y[rows], whole=False)
            output = part.new_empty(len(steps), *part.shape[1:]) if output is None else output
            output[rows] = part
        assert output is not None
        return output

    forward_with_cfg = forward_with_cfg

    def for_run(self, timesteps: Sequence[float], y: Tensor) -> Denoiser:
        """The engine for one sampling run, in one thread; ``Sampler`` asks for it.

        Called as the engine is. On the CPU, not compiled, adaLN's modulations of the next timesteps are
        computed together, up to 32 samples times timesteps: small batches then take less time. A call that is
        not the next one of those announced is run as any other.

        Args:
            timesteps: of the calls, in their order, each as one number.
            y: of every call: labels (B,), of both halves under guidance, or texts.
        """
        modulates = self.shape.conditioning in MODULATION_ROWS
        if not modulates or self._compile or y.device.type != "cpu" or y.ndim != 1:
            return self  # which also refuses labels of another shape
        ahead = Ahead(self.model, timesteps, y)

        def call(x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
            with ahead.calling():  # not an argument: whoever stands in for an engine has the call of a model
                return self(x, t, y)

        return call

    def subnetwork(self, timestep: float) -> Subnetwork:
        """The subnetwork of one timestep as a network of its own, to compile, export or capture as one graph.

        It has slices of its own, besides the memory budget, and computes in the engine's mode.

        Raises:
            ScheduleError: the timestep is not in the schedule.
        """
        position = self.schedule.index_of(timestep)
        blocks = [
            BlockAtTimestep(block, self._packs.take(position, i), self._capacity(position, i))
            for i, block in enumerate(self._sliced_blocks(STAGES))
        ]
        return Subnetwork(self.model, float(timestep), blocks)

    def pack_statistics(self) -> PackStatistics:
        """Hits, misses, bytes and evictions of the packed weights."""
        return self._packs.statistics()

    def computed_tokens(self, kept: int) -> int:
        """Tokens of a batch of which the MLP of a block computes something when it keeps ``kept`` of them.

        More than these in bfloat16 and float16 on the CPU, not compiled, see ``filled_up``: the others are
        computed in vain.
        """
        return filled_up(kept) if self._fills_up else kept

    @property
    def records(self) -> bool:
        """Whether timesteps are recorded as CUDA graphs, outside of autocast, until the engine is moved."""
        # Recordings read slices where they lie: none may be dropped.
        on_gpu = next(self.model.parameters()).is_cuda
        return self._compile and self.mode == "capacity" and on_gpu and self._packs.all_fit

    def mac_scopes(self) -> dict[str, str]:
        """Name of each block in a MAC report -> the submodule whose call it is."""
        return {f"block {i}": f"blocks.{i}" for i in range(self.shape.depth)}

    def mac_parts(self) -> dict[str, str]:
        """Name of a layer -> its part in a MAC report."""
        return {**self.model.mac_parts(), "sliced_attention": ATTENTION_PROJECTIONS, "sliced_mlp": MLP}

    def __reduce__(self) -> tuple[Any, ...]:
        """For ``copy.deepcopy`` and ``pickle``: the model and what was asked for; nothing is packed then."""
        asked = (None, self._packs.asked, False, self.mode, self._compile)
        return type(self), (self.model, self.schedule, *asked)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubnetEngine:
        """Move or convert the model (``.to``); what was packed and recorded is stale then.

        Raises:
            ConfigError: the memory budget is smaller than one block in the new dtype, in which the model is
                then: convert it back.
        """
        self._forget()
        moved = super()._apply(fn, recurse)
        self._packs.measure()
        return moved

    def _forget(self) -> None:
        """Drop what was made of weights that are no longer there."""
        self._graphs.clear()
        self._workspaces.clear()
        self._packs.forget()

    def _sliced_blocks(self, stages: Stages) -> Iterator[SlicedBlock]:
        adapter, threshold = self.model.adapter, self.schedule.routing.token_threshold
        for block, routers in zip(adapter.blocks(self.model.backbone), self.model.routers, strict=True):
            yield SlicedBlock(adapter, block, routers.token_router, threshold, stages)

    def _run(self, position: int, x: Tensor, t: Tensor | float, y: Tensor, whole: bool = True) -> Tensor:
        """Run the subnetwork of the schedule's timestep at ``position`` on a batch that shares it.

        Args:
            whole: whether it is the caller's batch. Of parts of one, which may have any size, no recordings
                are made and kept.
        """
        if self._packs.stale:  # the model was moved or converted, not through this engine
            self._forget()
            self._packs.measure()
        if whole and self.records and not torch.jit.is_tracing():  # fvcore counts what it can trace
            inputs = (x, batch_timesteps(t, x), y)
            return self._graphs(position, partial(self._run_blocks, position), *inputs)
        with self._packs.preparing_next(position, x.device):
            return self._run_blocks(position, x, t, y)

    def _run_blocks(self, position: int, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        adapter, backbone = self.model.adapter, self.model.backbone
        on_cpu = self._is_on_cpu(x)
        made = conditioned_ahead(self.model, t, len(x), y) if on_cpu else None
        cond = adapter.condition(backbone, batch_timesteps(t, x), y) if made is None else made.cond
        tokens = adapter.embed(backbone, x, cond).contiguous()  # the token path works on its rows in place
        if on_cpu:
            blocks = [*adapter.blocks(backbone)]
            # Before all blocks: between them, weights that are read once would push tokens out of the caches.
            modulations = adapter.modulations(blocks, cond) if made is None else made.modulations
            tokens = self._on_cpu(position, tokens, cond, modulations)
        else:
            tokens = self._anywhere(position, tokens, cond)
        return adapter.decode(backbone, tokens, cond)

    def _anywhere(self, position: int, tokens: Tensor, cond: Conditioning) -> Tensor:
        fill_up = self._fills_up
        for i, block in enumerate(self.blocks):
            with self._packs.use(position, i) as packed:
                tokens = block(tokens, cond, packed, self._capacity(position, i), fill_up)
            del packed  # else the name would hold the slices while the next block's are made
        return tokens

    def _on_cpu(
        self, position: int, tokens: Tensor, cond: Conditioning, modulations: Sequence[Modulation]
    ) -> Tensor:
        fill_up = self._fills_up
        with self._workspaces.one() as workspace:
            for i, (block, m) in enumerate(zip(self._blocks_on_cpu, modulations, strict=True)):
                with self._packs.use(position, i) as packed:
                    capacity = self._capacity(position, i)
                    tokens = block(tokens, cond, m, packed, capacity, fill_up, workspace)
                del packed  # else the name would hold the slices while the next block's are made
        return tokens

    def _is_on_cpu(self, x: Tensor) -> bool:
        """Whether blocks run in the form for CPUs. fvcore counts the other, of which it knows every part."""
        if self._compile or x.device.type != "cpu":
            return False
        return not (torch.is_autocast_enabled("cpu") or torch.jit.is_tracing())

    @property
    def _fills_up(self) -> bool:
        weight = next(self.model.parameters())
        half_on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
        return half_on_cpu and not self._compile

    def _capacity(self, position: int, block: int) -> int | None:
        """Tokens of each sample that enter the MLP; None where the threshold decides."""
        if self.mode == "exact":
            return None
        assert self.schedule.capacities is not None
        return int(self.schedule.capacities[position, block])


def _check_mode(mode: str, schedule: SubnetSchedule) -> None:
    if mode not in get_args(Mode):
        raise ConfigError(
            f"mode {mode!r}", expected=" or ".join(get_args(Mode)), remedy="choose one of these"
        )
    if mode == "capacity" and schedule.capacities is None:
        raise ScheduleError(
            "a schedule without capacities",
            expected="the number of tokens per timestep and block, which mode capacity needs",
            remedy="export again with --capacity",
        )


def _take_no_weights(engine: SubnetEngine, *_: Any) -> None:
    """Refuse other weights: the schedule is that of the engine's own, of which slices were made."""
    raise ScheduleError(
        "weights for an engine that has some",
        expected=f"those with sha256 {engine.schedule.weights[:12]}…, which the schedule was exported from",
        remedy="load them into the model, export, and make a new engine",
    )


def _check_weights(model: DyDiT, schedule: SubnetSchedule) -> None:
    seen = weights_sha256(model)
    if seen != schedule.weights:
        raise ScheduleError(
            f"weights with sha256 {seen[:12]}…",
            expected=f"{schedule.weights[:12]}…, which the schedule was exported from",
            remedy="load those weights in the dtype of the export, or export again",
        )
