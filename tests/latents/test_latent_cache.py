"""Encoding a folder into shards, going on after a kill, and reading the latents back."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_builders import SIDE, save_image
from safetensors.torch import load_file, save_file

from dydit.config import DataConfig, RunConfig
from dydit.errors import ConfigError, DataError, OutputError, ShapeError
from dydit.latents import posteriors
from dydit.latents.autoencoder import Autoencoder, load_autoencoder
from dydit.latents.cache import CachedLatents
from dydit.latents.image_folder import load_image, to_signed
from dydit.shapes import ModelShape
from dydit.training import run_training
from dydit.training.data import check_fits, make_dataset
from dydit.training.samples import batches

Encode = Callable[..., Any]
SCALE = 0.18215


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the calls of the autoencoder."""
    made: list[int] = []
    real = Autoencoder.posterior

    def posterior(self: Autoencoder, images: torch.Tensor) -> Any:
        made.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Autoencoder, "posterior", posterior)
    return made


def test_the_cache_holds_the_posteriors(
    encode: Encode, autoencoder: Autoencoder, images: Path, tmp_path: Path
) -> None:
    result = encode(dtype="float32", flip=True)
    assert sorted(contents(tmp_path / "cache")) == [
        "manifest.json",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]
    assert (result.kept, result.manifest.images, result.manifest.complete) == (0, 7, True)
    for entry in result.manifest.shards:
        tensors = load_file(tmp_path / "cache" / entry.name)
        assert tensors["labels"].tolist() == [int(name.startswith("dog")) for name in entry.files]
        pixels = to_signed(torch.stack([load_image(images / name, SIDE) for name in entry.files]))
        for suffix, view in (("", pixels), ("_mirrored", pixels.flip(-1))):
            mean, std = autoencoder.posterior(view)
            torch.testing.assert_close(tensors[f"mean{suffix}"], mean)
            torch.testing.assert_close(tensors[f"std{suffix}"], std)


def test_the_manifest_tells_all_about_it(encode: Encode, autoencoder: Autoencoder, tmp_path: Path) -> None:
    encode()
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    vae = {"name": autoencoder.name, "sha256": autoencoder.sha256, "scaling_factor": SCALE, "shift": 0.0}
    assert manifest["settings"] == {
        "vae": vae, "image_size": SIDE, "latent_shape": [4, 8, 8], "dtype": "float16", "flip": False,
        "shard_size": 3,
    }  # fmt: skip
    assert manifest["format_version"] == 1 and manifest["classes"] == {"cat": 0, "dog": 1}
    assert [name for shard in manifest["shards"] for name in shard["files"]] == [
        *(f"cat/0{i}.png" for i in range(4)), *(f"dog/deep/0{i}.png" for i in range(3)),
    ]  # fmt: skip


def test_equal_folders_give_equal_bytes(encode: Encode, tmp_path: Path, calls: list[int]) -> None:
    before = torch.get_rng_state()
    encode("a", flip=True)
    encode("b", flip=True, num_workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)
    made = len(calls)
    assert encode("a", flip=True).kept == 3  # a third run finds everything there
    assert len(calls) == made and contents(tmp_path / "a") == contents(tmp_path / "b")


KILL = """
import os, signal, sys
from dydit.cli.app import main

real, renames = os.replace, 0
def replace(source, target):
    global renames
    renames += 1
    if renames == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(
    encode: Encode, vae_folder: Path, images: Path, tmp_path: Path, calls: list[int]
) -> None:
    """Renames are: manifest, shard 0, manifest, shard 1, manifest, …; the fifth leaves shard 1 unlisted."""
    cache = tmp_path / "cache"
    words = ["encode", images, "--vae", vae_folder, "--out", cache, "--image-size", SIDE]
    words += ["--batch-size", 2, "--shard-size", 3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", KILL, *map(str, words)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    left = sorted(contents(cache))
    assert left[1:] == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    assert left[0].startswith(".manifest.json.")  # what it was writing
    with pytest.raises(
        DataError, match="is not complete: 3 images so far; run the same `dydit encode` again"
    ):
        CachedLatents(cache)
    assert encode().kept == 1
    assert calls == [2, 1, 1]  # of the second and third shard
    encode("whole")
    assert contents(cache) == contents(tmp_path / "whole")


@pytest.mark.parametrize("rename", range(1, 9))
def test_an_interrupted_run_goes_on_from_anywhere(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    real, renames = os.replace, itertools.count(1)

    def replace(source: Any, target: Any) -> None:
        if next(renames) == rename:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            encode()
    assert encode().kept == max(0, rename - 2) // 2
    encode("whole")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "altered", "gone"])
def test_a_damaged_shard_is_named_and_made_again(
    encode: Encode, tmp_path: Path, damage: str, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    encode()
    whole = contents(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(data[:-1] if damage == "cut" else data)
    said = {"cut": "bytes; expected", "altered": "is not the file its manifest", "gone": "cannot be read"}[
        damage
    ]
    with pytest.raises(DataError, match=f"shard-00001.safetensors .*{said}"):
        CachedLatents(tmp_path / "cache")
    calls.clear()
    assert encode().kept == 2 and calls == [2, 1]
    assert "shard-00001.safetensors" in capsys.readouterr().err
    assert contents(tmp_path / "cache") == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(3, 4, 4, 4, dtype=torch.float16)}, r"has mean of shape \(3, 4, 4, 4\)"),
        (
            {"mean": torch.zeros(3, 4, 8, 8)},
            "has mean of .* type F32; expected mean of .* type F16",
        ),
        ({"mean": None}, "has no tensor mean"),
        ({"more": torch.zeros(1)}, "has more of shape .* expected no tensor more"),
    ],
)
def test_a_shard_with_other_tensors_is_named(
    encode: Encode, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    encode()
    path = tmp_path / "cache" / "shard-00001.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(DataError, match=rf"shard-00001\.safetensors {message}"):
        CachedLatents(tmp_path / "cache", verify=False)


def test_a_shard_that_goes_while_reading_is_named(encode: Encode, tmp_path: Path) -> None:
    encode()
    cache = CachedLatents(tmp_path / "cache")
    (tmp_path / "cache" / "shard-00000.safetensors").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.safetensors cannot be read"):
        cache[0]
    assert cache[6][1] == 1


def test_other_settings_never_share_a_folder(
    encode: Encode, autoencoder: Autoencoder, tmp_path: Path, images: Path
) -> None:
    encode()
    before = contents(tmp_path / "cache")
    for change, message in (
        ({"image_size": 8}, "image_size=16; expected image_size=8"),
        ({"dtype": "float32"}, "dtype=float16; expected dtype=float32"),
        ({"flip": True}, "flip=False; expected flip=True"),
        ({"shard_size": 4}, "shard_size=3; expected shard_size=4"),
    ):
        with pytest.raises(OutputError, match=message):
            encode(**change)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files; expected a new folder or a cache"):
        encode("notes")
    with pytest.raises(OutputError, match="lies in the folder of the images"):
        encode("images/cat/cache")
    with pytest.raises(ShapeError, match="15 × 15"):
        encode("odd", image_size=15)
    assert contents(tmp_path / "cache") == before and not (tmp_path / "odd").exists()


def test_the_same_weights_elsewhere_go_on_and_others_do_not(
    encode: Encode, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latent_builders import tiny_vae

    from dydit.latents.encode import encode_folder
    from dydit.latents.image_folder import scan_images

    encode()
    config = posteriors.EncodeConfig(image_size=SIDE, batch_size=2, shard_size=3)
    for seed, name in ((0, "moved"), (1, "other")):
        tiny_vae(seed).save_pretrained(tmp_path / name)
        loaded = load_autoencoder(tmp_path / name, "cpu")
        if seed == 0:
            result = encode_folder(scan_images(images), loaded, tmp_path / "cache", config)
            assert result.kept == 3 and result.manifest.settings.vae.name == str(tmp_path / "moved")
        else:
            with pytest.raises(OutputError, match=r"vae\.sha256="):
                encode_folder(scan_images(images), loaded, tmp_path / "cache", config)


def test_images_that_change_are_encoded_again(
    encode: Encode, images: Path, tmp_path: Path, calls: list[int]
) -> None:
    encode()
    save_image(images / "dog" / "deep" / "02.png", 9, size=(40, 40))
    save_image(images / "dog" / "deep" / "03.png", 10)
    calls.clear()
    assert encode().kept == 2 and calls == [2]
    assert len(CachedLatents(tmp_path / "cache")) == 8
    for path in (images / "dog" / "deep").iterdir():
        path.unlink()
    save_image(images / "dog" / "1.png", 9)
    assert encode().kept == 1
    encode("anew")
    assert contents(tmp_path / "cache") == contents(tmp_path / "anew")


def break_images(images: Path) -> None:
    (images / "cat" / "01.png").write_bytes((images / "cat" / "01.png").read_bytes()[:60])
    (images / "cat" / "02.png").unlink()
    (images / "cat" / "02.png").symlink_to(images / "nowhere.png")


def test_bad_images_stop_the_run_or_are_listed(
    encode: Encode, images: Path, tmp_path: Path, calls: list[int]
) -> None:
    whole = encode("whole").manifest
    break_images(images)
    with pytest.raises(DataError, match=r"cat/01\.png cannot be read \(.*repair or remove it"):
        encode()
    manifest = encode(on_bad="skip").manifest
    assert [skipped.name for skipped in manifest.all_skipped] == ["cat/01.png", "cat/02.png"]
    assert "No such file" in manifest.all_skipped[1].reason and str(tmp_path) not in str(manifest.all_skipped)
    assert manifest.images == 5 and manifest.shards[1:] == whole.shards[1:]
    with pytest.raises(DataError, match=r"made without cat/01\.png"):
        encode()
    # Repaired, they take their places.
    for number in (1, 2):
        (images / "cat" / f"0{number}.png").unlink()
        save_image(images / "cat" / f"0{number}.png", number)
    assert encode().kept == 2
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_shard_may_be_empty_but_not_all_of_them(encode: Encode, images: Path, tmp_path: Path) -> None:
    for number in range(3):
        (images / "cat" / f"0{number}.png").write_text("no image")
    assert [len(shard.files) for shard in encode(on_bad="skip").manifest.shards] == [0, 3, 1]
    cache = CachedLatents(tmp_path / "cache")
    assert len(cache) == 4 and cache.file_of(0) == "cat/03.png"
    for path in images.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"none of the 7 images can be used: cat/00\.png cannot be read"):
        encode("none", on_bad="skip")


def test_latents_beyond_the_number_format_are_bad_images(
    encode: Encode, autoencoder: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Autoencoder.posterior
    monkeypatch.setattr(Autoencoder, "posterior", lambda self, x: tuple(1e6 * t for t in real(self, x)))
    with pytest.raises(DataError, match=r"cat/00\.png has a latent that is not finite in float16"):
        encode()
    assert encode("wide", dtype="bfloat16").manifest.images == 7


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 0)])
def test_means_at_the_models_scale(
    encode: Encode, autoencoder: Autoencoder, images: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    encode(dtype=dtype, batch_size=1)
    cache = CachedLatents(tmp_path / "cache", sample=False)
    for index in range(len(cache)):
        pixels = to_signed(load_image(images / cache.file_of(index), SIDE))[None]
        wanted = autoencoder.posterior(pixels)[0][0] * SCALE
        found, label = cache[index]
        assert found.dtype == torch.float32 and label == index // 4
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)


def test_reading_draws_from_the_posterior(encode: Encode, tmp_path: Path) -> None:
    encode(dtype="float32")
    cache = CachedLatents(tmp_path / "cache")
    tensors = load_file(tmp_path / "cache" / "shard-00001.safetensors")
    torch.manual_seed(0)
    draws = torch.stack([cache[3][0] for _ in range(400)])
    noise = (draws / SCALE - tensors["mean"][0]) / tensors["std"][0]
    # 400 · 256 standard normal numbers: mean and variance within five of their standard errors.
    count = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(count) and abs(noise.var() - 1) < 5 * math.sqrt(2 / count)
    torch.manual_seed(0)
    assert torch.equal(cache[3][0], draws[0]) and not torch.equal(draws[0], draws[1])
    # Loader processes of two ranks start from one seed; their noise must differ all the same.
    torch.manual_seed(0)
    other = (cache[4][0] / SCALE - tensors["mean"][1]) / tensors["std"][1]
    assert abs((other * noise[0]).mean()) < 5 / math.sqrt(other.numel())


def test_mirrored_twins_are_samples_of_their_own(encode: Encode, tmp_path: Path) -> None:
    encode(flip=True, dtype="float32")
    cache = CachedLatents(tmp_path / "cache", sample=False)
    assert len(cache) == 14 and cache.file_of(7 + 5) == cache.file_of(5)
    assert cache[7 + 5][1] == cache[5][1] == 1
    mirrored = load_file(tmp_path / "cache" / "shard-00001.safetensors")["mean_mirrored"][2]
    assert torch.equal(cache[7 + 5][0], mirrored * SCALE) and not torch.equal(cache[5][0], cache[12][0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read .No such file.*expected a folder that `dydit encode` wrote"),
        ("{", "is not JSON"),
        ("[]", "has format version None; expected 1"),
        ('{"format_version": 2}', "has format version 2; expected 1"),
        ('{"format_version": 1}', "complete: Field required"),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=rf"manifest\.json:? {message}"):
        CachedLatents(tmp_path)


def test_a_damaged_shard_is_left_out_where_that_is_asked_for(
    encode: Encode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encode(flip=True)
    path = tmp_path / "cache" / "shard-00001.safetensors"
    whole = CachedLatents(tmp_path / "cache", sample=False)
    path.write_bytes(path.read_bytes()[:-1])
    config = DataConfig(name="latents", path=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"shard-00001\.safetensors has \d+ bytes"):
        make_dataset(config)
    cache = make_dataset(config.model_copy(update={"on_bad": "skip"}))
    assert isinstance(cache, CachedLatents) and len(cache) == 2 * 4
    assert [cache.file_of(i) for i in range(4)] == [whole.file_of(i) for i in (0, 1, 2, 6)]
    cache.sample = False
    for here, there in ((3, 6), (4 + 3, 7 + 6)):  # the mirrored ones come after all others
        assert torch.equal(cache[here][0], whole[there][0]) and cache[here][1] == whole[there][1]
    assert re.search(r"1 skipped \(data.on_bad=skip\).*shard-00001.*its 3 images", caplog.text)
    for shard in (tmp_path / "cache").glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(DataError, match=r"has no shard that can be read; encode it again"):
        CachedLatents(tmp_path / "cache", on_bad="skip")


def test_a_manifest_names_only_files_beside_it(encode: Encode, tmp_path: Path) -> None:
    encode()
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(path.read_text().replace("shard-00001.safetensors", "../shard-00001.safetensors"))
    with pytest.raises(DataError, match=r"shards\.1\.name: String should match"):
        CachedLatents(tmp_path / "cache")


SHAPE = ModelShape(
    sample_size=(8, 8), patch_size=2, in_channels=4, out_channels=8, hidden_size=32, depth=2, num_heads=4,
    mlp_hidden=128, mlp_groups=4, num_classes=2,
)  # fmt: skip


def test_latents_as_a_training_set(encode: Encode, images: Path, tmp_path: Path) -> None:
    (images / "classes.json").write_text('{"cat": 1, "dog": 5}')
    encode(flip=True)
    config = DataConfig(name="latents", path=str(tmp_path / "cache"), batch_size=7)
    cache: Any = make_dataset(config)
    assert len(pickle.dumps(cache)) > 0  # for loader processes that are not forked
    with pytest.raises(DataError, match="6 classes; expected at most the model's 2"):
        check_fits(cache, SHAPE)
    with pytest.raises(DataError, match="has label 5; expected 0 to 1"):
        list(itertools.islice(batches(cache, config, SHAPE, seed=0), 2))
    for change, message in (
        ({"flip": True}, "encode with --flip"),
        ({"image_size": 32}, "16, the size that"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_dataset(DataConfig(name="latents", path=str(tmp_path / "cache"), **change))
    assert len(make_dataset(DataConfig(name="latents", path=str(tmp_path / "cache"), image_size=SIDE))) == 14


def test_a_draw_for_training_is_a_function_of_seed_epoch_and_sample(encode: Encode, tmp_path: Path) -> None:
    encode(dtype="float32", flip=True)
    cache = CachedLatents(tmp_path / "cache")
    state = torch.get_rng_state()
    first = cache.redraw(3, 7, 0)[0]
    torch.manual_seed(1)
    assert torch.equal(CachedLatents(tmp_path / "cache").redraw(3, 7, 0)[0], first)
    for other in ((3, 7, 1), (3, 8, 0), (3, 0, 7)):
        assert not torch.equal(cache.redraw(*other)[0], first)
    torch.set_rng_state(state)
    tensors = load_file(tmp_path / "cache" / "shard-00001.safetensors")
    draws = torch.stack([cache.redraw(3, 7, epoch)[0] for epoch in range(400)])
    assert torch.equal(torch.get_rng_state(), state)
    noise = (draws / SCALE - tensors["mean"][0]) / tensors["std"][0]
    count = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(count) and abs(noise.var() - 1) < 5 * math.sqrt(2 / count)


def latent_run(tmp_path: Path, name: str, steps: int, workers: int) -> RunConfig:
    """Four samples a step of seven: an epoch ends within every other batch."""
    model = {
        "sample_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2,
        "num_classes": 2,
    }  # fmt: skip
    return RunConfig(
        task="pretrain",
        output_dir=str(tmp_path / name),
        model=model,
        data={"name": "latents", "path": str(tmp_path / "cache"), "batch_size": 4, "num_workers": workers},
        train={"steps": steps, "save_every": 2, "log_every": 1},
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_on_latents_is_the_run_that_was_not_stopped(
    encode: Encode, tmp_path: Path, workers: int
) -> None:
    """Stopped at one number of loader processes, killed at another, resumed: the same bits."""
    encode()
    straight = run_training(latent_run(tmp_path, "straight", 8, 0))
    run_training(latent_run(tmp_path, "stopped", 2, workers))
    assert kill_after(latent_run(tmp_path, "stopped", 8, workers), step=5) == -signal.SIGKILL
    resumed = run_training(latent_run(tmp_path, "stopped", 8, workers), "auto")
    assert math.isfinite(straight.metrics["loss"])
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def kill_after(cfg: RunConfig, step: int) -> int:
    """Resume ``cfg`` in a child that is killed after ``step``; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

        def at_step(done: int, _metrics: Any) -> None:
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        run_training(cfg, "auto", callback=at_step)
    finally:
        os._exit(1)


def test_every_epoch_sees_other_draws_and_loader_processes_change_nothing(
    encode: Encode, tmp_path: Path
) -> None:
    encode()
    taken = []
    for workers in (0, 2):
        config = DataConfig(name="latents", path=str(tmp_path / "cache"), batch_size=7, num_workers=workers)
        stream = batches(make_dataset(config), config, SHAPE, seed=3)
        taken.append(
            [batch.images[batch.labels.argsort(stable=True)] for batch in itertools.islice(stream, 2)]
        )
    for alone, helped in zip(*taken, strict=True):
        assert torch.equal(alone, helped)
    one, two = (sorted(image.mean().item() for image in epoch) for epoch in taken[0])
    assert all(a != b for a, b in zip(one, two, strict=True))


def test_an_image_repaired_without_a_change_of_size_takes_its_place(
    encode: Encode, images: Path, tmp_path: Path
) -> None:
    encode("whole")
    path = images / "cat" / "01.png"
    content = path.read_bytes()
    path.write_bytes(b"\0" * len(content))
    assert encode(on_bad="skip").manifest.images == 6
    assert encode(on_bad="skip").kept == 3  # still broken: nothing to do
    path.write_bytes(content)
    assert encode().kept == 2
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("flip", [False, True])
def test_a_cache_ends(encode: Encode, tmp_path: Path, flip: bool) -> None:
    encode(flip=flip)
    cache = CachedLatents(tmp_path / "cache")
    assert len(list(cache)) == len(cache) == 7 * (2 if flip else 1)
    for index in (-1, len(cache)):
        with pytest.raises(IndexError):
            cache[index]
