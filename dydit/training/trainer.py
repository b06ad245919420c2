"""One step of training, and the whole state behind it: the same for a static and for a dynamic model."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from dydit.config import RunConfig
from dydit.diffusion import make_objective
from dydit.dynamic.compute_loss import ramped_target
from dydit.errors import TrainingError
from dydit.training import state
from dydit.training.acceleration import make_accelerator, prepare
from dydit.training.batch import DrawKey, NoisyBatch, draw, noisy_batch
from dydit.training.branches import Branches
from dydit.training.checkpoint import Snapshot
from dydit.training.checks import check_dropout, check_model, check_same_run, check_target
from dydit.training.data import Batch, LabelledImages, check_fits
from dydit.training.faults import faulty_router, over_processes
from dydit.training.losses import LossTerms
from dydit.training.memory import return_freed_memory
from dydit.training.metrics import Window
from dydit.training.optim import lr_factor, make_ema, make_optimizer, set_learning_rate, update_ema
from dydit.training.order import epochs_seen
from dydit.training.rng import RngState, capture_rng, restore_rng
from dydit.training.samples import batches
from dydit.training.schedules import gate_temperature
from dydit.training.signals import StopRequest

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is.

    Args:
        step: optimiser steps done, skipped ones included.
        position: samples that all processes together have consumed.
        skipped: steps skipped for a non-finite loss or gradient.
        skipped_in_a_row: the last of them, without a good one between.
    """

    step: int = 0
    position: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Trainer:
    """Everything a training step needs; ``step`` does one, ``snapshot`` and ``load`` carry it over a restart.

    Args:
        model: a DyDiT (task finetune) or a static backbone (task pretrain); trained in place.
        cfg: the run.
        dataset: training samples.
        teacher: the frozen backbone, for ``warmup.mode`` distill.

    Raises:
        ConfigError: the model is not the task's, or not routed as ``cfg.dydit`` says; the compute target
            cannot be reached; or a teacher is missing.
        DataError: the data set does not fit the model.
    """

    def __init__(self, model: Any, cfg: RunConfig, dataset: LabelledImages, teacher: Any = None) -> None:
        check_model(model, cfg)
        check_fits(dataset, model.shape, cfg.data.on_bad == "skip")
        check_dropout(model, cfg)
        if cfg.task == "finetune":
            check_target(model, cfg)
        self.cfg, self.dataset, self.plain = cfg, dataset, model
        self._kind = type(model)  # FSDP gives the model itself another class
        self.accelerator = make_accelerator(cfg.train)
        self.objective = make_objective(cfg.objective, learn_sigma=model.shape.learn_sigma)
        if cfg.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
            if self.accelerator.device.type == "cpu":
                return_freed_memory()
        model.train()
        self.model, self.optimizer = prepare(self.accelerator, model, make_optimizer(model, cfg.train))
        self.ema = make_ema(self.model, cfg.train)
        self.branches = Branches(self.accelerator, self.model, model, teacher, cfg)
        self.progress = Progress()
        self.window = Window()
        self._batches = self._stream()
        self._last: NoisyBatch | None = None
        self._seed(cfg.seed)  # for a backbone that draws numbers of its own (dropout)

    @property
    def raw_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser without accelerate's wrapper."""
        return self.optimizer.optimizer

    @property
    def global_batch(self) -> int:
        """Samples in one optimiser step, over all processes."""
        train, data = self.cfg.train, self.cfg.data
        return data.batch_size * train.grad_accumulation * self.accelerator.num_processes

    def step(self, stop: StopRequest | bool = False) -> bool:
        """One optimiser step: gradients of all micro-batches, clip, then one update of weights and EMA.

        A step whose loss or gradient is not finite, on any process, is skipped and counted.

        Args:
            stop: whether this process was asked to stop; read at the end of the step.

        Returns:
            Whether any process was asked to stop.

        Raises:
            TrainingError: ``train.max_nonfinite`` steps in a row were skipped.
        """
        train, progress = self.cfg.train, self.progress
        set_learning_rate(self.raw_optimizer, lr_factor(train, progress.step))
        self.optimizer.zero_grad(set_to_none=True)
        terms = [self._accumulate(micro) for micro in range(train.grad_accumulation)]
        limit = math.inf if train.clip_norm is None else train.clip_norm
        norm = state.whole(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))
        finite, stopping = self._agree([*(t.total.detach() for t in terms), norm], stop)
        if finite:
            self.optimizer.step()
            update_ema(self.ema, self.model)
            for term in terms:
                self.window.add({"loss": term.total, **term.parts})
            self.window.add({"grad_norm": norm})
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # fp16: an overflow lowers the loss scale
        progress.step += 1
        progress.position += self.global_batch
        self._count(finite)
        return stopping

    def metrics(self) -> dict[str, float]:
        """Means since the last call, with what is known without the device; then the window starts anew."""
        progress, dynamic = self.progress, self.cfg.task == "finetune"
        record: dict[str, float] = {"step": progress.step, **self.window.means(self.accelerator)}
        self.window.clear()
        if dynamic:
            compute = self.cfg.compute
            record["ratio_target"] = ramped_target(progress.step - 1, compute.target, compute.ramp_steps)
            record["ratio_eval"] = self.evaluated_ratio()
        record["lr"] = float(self.raw_optimizer.param_groups[0]["lr"])
        record["epoch"] = epochs_seen(progress.position, len(self.dataset))
        record["skipped"] = progress.skipped
        return record

    @torch.no_grad()
    def evaluated_ratio(self) -> float:
        """Executed share of the last batch with the gates of evaluation: thresholded, without noise.

        Training and evaluation differ: a head that is on with probability 0.75 in training always runs
        afterwards. NaN before the first step, and where a router gives NaN, which is logged with its name.
        """
        batch = self._last
        if batch is None:
            return math.nan
        self.model.eval()
        try:
            _, routing = self.model(batch.x_t, batch.t, batch.y, return_routing=True)
        finally:
            self.model.train()
        if router := over_processes(routing.logits):
            log.warning("step %d: evaluated, the logits of router %s are NaN", self.progress.step, router)
            return math.nan
        return float(self.branches.mean_over_ranks(self.branches.ratio(routing).mean()))

    def snapshot(self, metrics: dict[str, float] | None = None) -> Snapshot:
        """The whole state, gathered from all processes; a collective. Waits for the device.

        Args:
            metrics: the last record, kept with it.
        """
        rng = capture_rng()
        mine = {"rng": rng.values, "window": self.window.state()}
        states: list[Any] = gather_object([(mine, rng.tensors)])
        rng_tensors = {
            f"{rank}.{k}": t for rank, (_, tensors) in enumerate(states) for k, t in tensors.items()
        }
        scaler = self.accelerator.scaler
        return Snapshot(
            step=self.progress.step,
            tensors={
                "model": state.weights(self.model),
                "ema": state.ema_weights(self.model, self.ema),
                "optimizer": state.optimizer_tensors(self.model, self.raw_optimizer),
                "rng": rng_tensors,
            },
            state={
                "progress": asdict(self.progress),
                "metrics": metrics or {},
                "ema_steps": self.ema.optimization_step,
                "scaler": None if scaler is None else scaler.state_dict(),
                "processes": [values for values, _ in states],
                "config": self.cfg.model_dump(mode="json"),
            },
        )

    def load(self, snapshot: Snapshot) -> None:
        """Take up a state that ``snapshot`` gave, on the same or another number of processes.

        With as many processes as before the run goes on bit by bit; with another number, up to the order in
        which sums are rounded.

        Raises:
            CheckpointError: it belongs to another model, objective or seed.
        """
        check_same_run(self.cfg, snapshot.state["config"])
        saved, tensors = snapshot.state, snapshot.tensors
        state.load_ema(self.model, self.ema, tensors["ema"], saved["ema_steps"])
        state.load_weights(self.model, tensors["model"], "model.safetensors")
        state.load_optimizer(self.model, self.raw_optimizer, tensors.get("optimizer", {}))
        if saved["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.progress = Progress(**saved["progress"])
        self._batches.close()
        self._batches = self._stream()
        self._load_process(saved["processes"], tensors["rng"])

    def close(self) -> Any:
        """Load the averaged weights into the model, unwrap it, and let go of everything else.

        Returns:
            The model that came in (for FSDP a whole one in its place), in evaluation mode.
        """
        self._batches.close()
        self._last = self.branches.teacher = None
        model = state.unsharded(self.accelerator, self.model, self._kind, self.ema)
        self.accelerator.free_memory()
        return model.eval()

    def _accumulate(self, micro: int) -> LossTerms:
        """Gradients of one micro-batch; on the last one DDP averages them over the processes.

        The compute loss takes the ratio of each micro-batch by itself, so accumulating k batches squares k
        means over a k-th of the samples: a slightly noisier estimate than one large batch gives.
        """
        scale = 1.0 / self.cfg.train.grad_accumulation
        last = micro == self.cfg.train.grad_accumulation - 1
        batch = self._last = self._next(micro)
        step, terms = self.progress.step, []
        # A backward of its own: the two branches' activations are never in memory together.
        with self.accelerator.no_sync(self.model):
            complete = self.branches.complete(self.objective, batch, step)
            if complete is not None:
                terms.append(complete)
                self.accelerator.backward(complete.total * scale)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            terms.append(self.branches.main(self.objective, batch, step))
            self.accelerator.backward(terms[-1].total * scale)
        total = torch.stack([term.total.detach() for term in terms]).sum()
        return LossTerms(total, {name: value for term in terms for name, value in term.parts.items()})

    def _next(self, micro: int) -> NoisyBatch:
        device = self.accelerator.device
        images, labels = (tensor.to(device, non_blocking=True) for tensor in next(self._batches))
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        key = DrawKey(self.cfg.seed, self.progress.step, micro, rank, world)
        routed = self.plain.shape if self.cfg.task == "finetune" else None
        draws = draw(key, self.objective, self.cfg.data, tuple(images.shape), device, routed)
        if draws.gates is not None and self.cfg.gates.final_temperature is not None:
            value = gate_temperature(self.cfg.gates, self.cfg.dydit.temperature, self.progress.step)
            # A tensor: a number that changes would be compiled anew at every step.
            gates = replace(draws.gates, temperature=torch.full((), value, device=device))
            draws = replace(draws, gates=gates)
        return noisy_batch(Batch(images, labels), draws, self.objective, self.plain.null_label, rank, world)

    def _stream(self) -> Any:
        return batches(
            self.dataset, self.cfg.data, self.plain.shape, self.cfg.seed,
            position=self.progress.position,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )  # fmt: skip

    def _agree(self, values: list[Tensor], stop: StopRequest | bool) -> tuple[bool, bool]:
        """Whether all of ``values`` are finite on all processes, and whether any process is to stop.

        The one wait for the device in a step, after the backward: the host must know before it updates.
        """
        bad = ~torch.stack([value.detach().float().reshape(()) for value in values]).isfinite().all()
        flags = torch.stack([bad.float(), torch.full_like(bad, bool(stop), dtype=torch.float32)])
        any_bad, any_stop = self.accelerator.reduce(flags, "sum").tolist()
        return any_bad == 0, any_stop > 0

    def _count(self, finite: bool) -> None:
        progress, limit = self.progress, self.cfg.train.max_nonfinite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        progress.skipped += not finite
        if finite:
            return
        fault = self._fault()
        if progress.skipped_in_a_row == 1:
            log.warning("step %d was skipped: its loss or gradient is not finite%s", progress.step, fault)
        if progress.skipped_in_a_row >= limit:
            raise TrainingError(
                f"loss or gradient was not finite in {progress.skipped_in_a_row} steps in a row, up to step "
                f"{progress.step}{fault}",
                remedy="lower train.lr or train.clip_norm, or check the data",
            )

    def _fault(self) -> str:
        router = faulty_router(self.model, self._last) if self.cfg.task == "finetune" else ""
        return f"; the logits of router {router} are NaN" if router else ""

    def _load_process(self, processes: list[Any], tensors: Any) -> None:
        rank = self.accelerator.process_index
        if len(processes) == self.accelerator.num_processes:
            # Else what was gathered since the last record is let go: all processes must hold the same names.
            self.window.load(processes[rank]["window"], self.accelerator.device)
        if rank >= len(processes):
            self._seed(self.cfg.seed + self.progress.step)
            return
        mine = {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{rank}.")}
        restore_rng(RngState(mine, processes[rank]["rng"]))

    def _seed(self, seed: int) -> None:
        """Seed the global generators, differently on each process."""
        set_seed((seed + self.accelerator.process_index) % 2**32)  # NumPy takes no more
