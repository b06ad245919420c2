"""A step, the guard around it, and what a run leaves behind."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dydit import convert, load_backbone, load_dydit
from dydit.config import RunConfig, load_config
from dydit.config.sections import MAX_SEED
from dydit.errors import CheckpointError, ConfigError, DataError, OutputError, TrainingError
from dydit.training import Trainer, make_dataset, run_training, train
from dydit.training.data import Digits
from dydit.training.optim import make_ema

MakeConfig = Callable[..., RunConfig]


def make_trainer(cfg: RunConfig) -> Trainer:
    assert cfg.backbone is not None
    return Trainer(convert(load_backbone(cfg.backbone), cfg.dydit), cfg, make_dataset(cfg.data))


def test_a_run_learns_and_spends_less(make_config: MakeConfig) -> None:
    cfg = make_config(
        train={"steps": 60, "lr": 2e-3, "router_lr": 0.05, "log_every": 10, "save_every": 100},
        warmup={"mode": "none"}, data={"batch_size": 32},
    )  # fmt: skip
    result = run_training(cfg)
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert last["loss_mse"] < 0.8 * first["loss_mse"]
    assert abs(last["ratio"] - 0.6) < 0.1 < abs(first["ratio"] - 0.6)
    assert result.metrics == last
    assert last["step"] == 60 and last["ratio_target"] == 0.6 and 0 < last["ratio_eval"] <= 1.1
    assert last["images_per_s"] > 0 and last["skipped"] == 0 and last["epoch"] == 60 * 32 // 1797


def test_the_run_folder_holds_config_pointer_and_averaged_weights(make_config: MakeConfig) -> None:
    cfg = make_config(train={"steps": 4})
    result = run_training(cfg)
    run = Path(cfg.output_dir)
    assert sorted(p.name for p in run.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "latest", "metrics.jsonl", "model",
    ]  # fmt: skip
    assert load_config(run / "config.yaml", []) == cfg
    assert result.model_dir == run / "model" and not result.model.training
    loaded = load_dydit(run / "model")
    for (name, a), b in zip(loaded.named_parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 500]), torch.tensor([3, 10])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), result.model(x, t, y))


def test_a_model_already_built_trains_and_the_callers_generators_are_left_alone(
    make_config: MakeConfig,
) -> None:
    cfg = make_config(train={"steps": 2, "log_every": 1})
    model, seen = convert(load_backbone(str(cfg.backbone)), cfg.dydit), []
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    result = train(
        model, cfg, make_dataset(cfg.data), on_step=lambda step, metrics: seen.append((step, metrics))
    )
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after
    assert result.model is model
    assert [step for step, _ in seen] == [1, 2] and seen[-1][1] == result.metrics


def test_gradients_are_clipped_before_the_one_update(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(make_config(train={"clip_norm": 0.01, "grad_accumulation": 3}))
    norms = []
    update = torch.optim.AdamW.step

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(nn.utils.get_total_norm(grads).item())
        return update(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    trainer.step()
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert trainer.metrics()["grad_norm"] > 0.1  # the log has the norm before clipping


def test_accumulated_micro_batches_average_their_gradients(make_config: MakeConfig) -> None:
    """Equal gates and draws: two micro-batches of the same samples give the gradient of one."""
    grads = []
    for parts in (1, 2):
        cfg = make_config(
            train={"grad_accumulation": parts, "clip_norm": None, "steps": 1},
            warmup={"mode": "none"}, dydit={"open_bias": 40.0, "token_open_bias": 40.0},
        )  # fmt: skip
        trainer = make_trainer(cfg)
        batch = trainer._next(0)
        trainer._next = lambda _micro, batch=batch: batch  # type: ignore[method-assign]
        trainer.step()
        grads.append([p.grad.clone() for p in trainer.plain.parameters() if p.grad is not None])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def break_loss(trainer: Trainer, steps: set[int]) -> None:
    """Make the diffusion loss NaN at the given steps."""
    objective = trainer.objective

    class Breaking:
        sample_t, corrupt = objective.sample_t, objective.corrupt

        def loss(self, *args: Any) -> Any:
            loss = objective.loss(*args)
            factor = torch.nan if trainer.progress.step in steps else 1.0
            return replace(loss, total=loss.total * factor)

    trainer.objective = Breaking()  # type: ignore[assignment]


def test_a_step_with_a_non_finite_loss_changes_nothing_and_is_counted(make_config: MakeConfig) -> None:
    trainer = make_trainer(make_config(train={"max_nonfinite": 2}))
    break_loss(trainer, {1, 3})
    for step in range(5):
        before = {k: v.clone() for k, v in trainer.plain.state_dict().items()}
        shadow = [p.clone() for p in trainer.ema.shadow_params]
        trainer.step()
        changed = any(not torch.equal(v, before[k]) for k, v in trainer.plain.state_dict().items())
        averaged = any(not torch.equal(a, b) for a, b in zip(shadow, trainer.ema.shadow_params, strict=True))
        assert changed == averaged == (step not in {1, 3})
    record = trainer.metrics()
    assert record["skipped"] == 2 and record["step"] == 5
    assert all(np.isfinite(value) for value in record.values())


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.__init__

    def broken(self: Trainer, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        break_loss(self, set(range(5, 100)))

    monkeypatch.setattr(Trainer, "__init__", broken)
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row, up to step 8.*step-00000004"):
        run_training(make_config(train={"max_nonfinite": 3}))


def test_ctrl_c_saves_and_the_old_handler_comes_back(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(step: int, _metrics: Any) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    result = run_training(make_config(), callback=interrupt)
    assert result.stopped and result.checkpoint is not None and result.checkpoint.is_dir()
    assert signal.getsignal(signal.SIGINT) is before
    assert f"stopped by SIGINT at step {result.steps}; continue with --resume auto" in capsys.readouterr().err


def test_a_dry_run_tries_a_step_and_writes_nothing(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make_config()
    result = run_training(cfg, dry_run=True)
    assert result.steps == 1 and result.checkpoint is None
    assert not Path(cfg.output_dir).exists()
    printed = capsys.readouterr().out
    for text in (
        "task: finetune",
        "in routers)",
        "GMACs",
        "GFLOPs",
        "target 0.6",
        "one step of 8 images: step 1",
    ):
        assert text in printed


def test_an_unreachable_target_is_refused_with_the_lowest_there_is(make_config: MakeConfig) -> None:
    cfg = make_config(compute={"target": 0.05})
    with pytest.raises(ConfigError, match=r"compute\.target is 0\.05; expected at least 0\.\d+, the least"):
        run_training(cfg)
    assert not Path(cfg.output_dir).exists()


def test_distilling_needs_a_teacher(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"warmup\.mode is distill without a teacher; pass frozen_backbone"):
        make_trainer(make_config(warmup={"mode": "distill"}))


def test_the_warm_up_ends_when_its_steps_are_over(make_config: MakeConfig) -> None:
    trainer = make_trainer(make_config(warmup={"mode": "complete", "steps": 2}))
    extra = []
    for _ in range(4):
        trainer.step()
        extra.append("loss_complete" in trainer.metrics())
    assert extra == [True, True, False, False]


def test_a_warm_up_of_weight_zero_is_off(make_config: MakeConfig) -> None:
    trainer = make_trainer(make_config(warmup={"mode": "complete", "steps": 6, "weight": 0.0}))
    trainer.step()
    assert "loss_complete" not in trainer.metrics()


def test_a_backbone_stored_in_half_precision_trains_in_float32(
    make_config: MakeConfig, backbone_folder: Path, tmp_path: Path
) -> None:
    nn.Module.to(load_backbone(backbone_folder), torch.bfloat16).save_pretrained(tmp_path / "half")
    result = run_training(make_config(backbone=str(tmp_path / "half"), train={"steps": 2}))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_float16_on_a_cpu_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"fp16 on a CPU; expected bf16 or no; set it to bf16"):
        make_trainer(make_config(train={"mixed_precision": "fp16"}))


def test_the_largest_seed_there_is(make_config: MakeConfig) -> None:
    make_trainer(make_config(seed=MAX_SEED)).step()


def test_records_of_another_number_of_processes_start_anew(make_config: MakeConfig) -> None:
    """Means over a window need the same terms on every process: one that was not there before has none."""
    first, alone, grown = (make_trainer(make_config()) for _ in range(3))
    first.step()  # no record since: its window is full
    snapshot = first.snapshot()
    alone.load(copy.deepcopy(snapshot))
    snapshot.state["processes"] *= 2
    grown.load(snapshot)
    for trainer in (alone, grown):
        trainer.step()
    assert torch.equal(*(next(trainer.plain.parameters()) for trainer in (alone, grown)))
    assert alone.metrics()["loss"] != grown.metrics()["loss"]


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_memory_savers_change_no_result_much(make_config: MakeConfig, precision: str) -> None:
    losses = []
    for saving in (False, True):
        train_section = {"mixed_precision": precision, "gradient_checkpointing": saving, "clip_norm": None}
        trainer = make_trainer(make_config(train=train_section))
        trainer.step()
        losses.append(trainer.metrics())
    for key in ("loss", "grad_norm", "ratio"):
        assert losses[0][key] == pytest.approx(losses[1][key], rel=1e-5 if precision == "no" else 2e-2)


@pytest.mark.parametrize("kind", ["head_router", "group_router", "token_router"])
def test_a_router_with_nan_logits_is_named(
    make_config: MakeConfig, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(make_config(train={"max_nonfinite": 2}))
    router = getattr(trainer.plain.routers[1], kind)
    with torch.no_grad():
        list(router.parameters())[-1].fill_(torch.nan)
    trainer.step()
    name = rf"the logits of router dynamic_blocks\.1\.routers\.{kind} are NaN"
    assert re.search(rf"step 1 was skipped.*{name}", caplog.text)
    with pytest.raises(TrainingError, match=name):
        trainer.step()


@pytest.mark.parametrize("kind", ["head_router", "group_router", "token_router"])
def test_a_router_with_nan_logits_is_named_in_evaluation_too(
    make_config: MakeConfig, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Thresholded, NaN would pass for closed, and the ratio for a good one."""
    trainer = make_trainer(make_config())
    trainer.step()
    assert math.isfinite(trainer.evaluated_ratio()) and not caplog.records
    with torch.no_grad():
        list(getattr(trainer.plain.routers[1], kind).parameters())[-1].fill_(torch.nan)
    assert math.isnan(trainer.metrics()["ratio_eval"])
    name = rf"the logits of router dynamic_blocks\.1\.routers\.{kind} are NaN"
    assert re.search(f"step 1: evaluated, {name}", caplog.text)


def test_averages_on_the_cpu_are_the_same_averages(make_config: MakeConfig) -> None:
    """Here both are on the CPU; what is tested is the copy that goes to it."""
    trainers = [make_trainer(make_config(train={"ema_device": place})) for place in ("model", "cpu")]
    trainers[1].plain.load_state_dict(trainers[0].plain.state_dict())
    for trainer in trainers:
        trainer.ema = make_ema(trainer.model, trainer.cfg.train)
        trainer.step()
    trainers[1].ema.shadow_params = [p.to("meta") for p in trainers[1].ema.shadow_params]
    trainers[1].step()  # copies go where the average lies
    assert all(p.device.type == "meta" for p in trainers[1].ema.shadow_params)
    for p in trainers[0].ema.shadow_params:
        assert p.device.type == "cpu"


def test_the_exported_averages_in_bf16_take_half_the_room(make_config: MakeConfig) -> None:
    result = run_training(make_config(train={"steps": 4, "model_dtype": "bfloat16"}))
    assert result.model_dir is not None and result.checkpoint is not None
    exported = next(result.model_dir.glob("*.safetensors"))
    stored = load_file(exported)
    for name, tensor in result.model.named_parameters():
        assert tensor.dtype == torch.float32  # the caller's model stays as it is
        assert torch.equal(stored[name], tensor.to(torch.bfloat16))
    full = load_file(result.checkpoint / "model.safetensors")
    assert full.keys() - stored.keys() == {"backbone.pos_embed"}  # see test_training_export.py
    assert sum(t.nbytes for t in stored.values()) * 2 < sum(t.nbytes for t in full.values())
    loaded = load_dydit(result.model_dir)
    assert loaded(torch.randn(1, 1, 8, 8).to(loaded.dtype), 500.0, torch.tensor([3])).isfinite().all()


def test_a_run_keeps_the_newest_checkpoints_and_the_milestones(make_config: MakeConfig) -> None:
    cfg = make_config(train={"steps": 12, "save_every": 2, "keep_last": 2, "keep_every": 6})
    run_training(cfg)
    kept = sorted(path.name for path in (Path(cfg.output_dir) / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000010", "step-00000012"]


def test_the_temperature_falls_without_the_model_changing(make_config: MakeConfig) -> None:
    trainer = make_trainer(make_config(gates={"final_temperature": 0.25, "anneal_steps": 2}))
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda _module, _args, options: seen.append(options.get("noise")), with_kwargs=True
    )
    for _ in range(3):
        trainer.step()
    temperatures = [float(noise.temperature) for noise in seen if noise is not None]
    assert temperatures == pytest.approx([1.0, 0.5, 0.25])
    assert trainer.plain.routing_config.temperature == 1.0


def test_a_dry_run_looks_where_the_run_would(make_config: MakeConfig) -> None:
    cfg = make_config(train={"steps": 4})
    run_training(cfg)
    with pytest.raises(OutputError, match="holds a run already, up to step 4"):
        run_training(cfg, dry_run=True)
    with pytest.raises(CheckpointError, match="no checkpoint at nowhere"):
        run_training(make_config("other"), dry_run=True, resume="nowhere")
    with pytest.raises(CheckpointError, match="made with seed=0"):
        run_training(make_config(seed=1), dry_run=True, resume="auto")
    assert run_training(cfg, dry_run=True, resume="auto").metrics["step"] == 5


def test_a_model_of_another_task_is_refused(make_config: MakeConfig) -> None:
    cfg = make_config()
    static = load_backbone(str(cfg.backbone))
    with pytest.raises(ConfigError, match="a DiT for task finetune; expected a DyDiT for finetune"):
        train(static, cfg, Digits())
    pretrain = RunConfig(
        task="pretrain", output_dir=cfg.output_dir, model={"preset": "DiT-S/2"}, train={"steps": 1}
    )
    with pytest.raises(ConfigError, match="a DyDiT for task pretrain"):
        train(convert(static, cfg.dydit), pretrain, Digits())
    assert not Path(cfg.output_dir).exists()


def test_a_model_that_is_routed_otherwise_than_the_configuration_is_refused(make_config: MakeConfig) -> None:
    cfg = make_config()
    model = convert(load_backbone(str(cfg.backbone)), cfg.dydit.model_copy(update={"temperature": 2.0}))
    with pytest.raises(
        ConfigError, match=r"converted with dydit\.temperature=2\.0, this run has dydit\.temperature=1\.0"
    ):
        train(model, cfg, Digits())


def test_images_in_bytes_are_refused(make_config: MakeConfig) -> None:
    class Bytes(Digits):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return (127.5 * (image + 1)).to(torch.uint8), label

    cfg = make_config()
    with pytest.raises(DataError, match=r"sample \d+ is torch\.uint8; expected float32 in \[-1, 1\]"):
        train(convert(load_backbone(str(cfg.backbone)), cfg.dydit), cfg, Bytes())
