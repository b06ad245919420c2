"""Loading an AutoencoderKL, its scale, and pictures of latents."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import EntryNotFoundError
from latent_builders import SIDE, tiny_vae
from PIL import Image
from safetensors.torch import load_file, save_file

from dydit.errors import CheckpointError, DataError, ShapeError
from dydit.latents.autoencoder import Autoencoder, load_autoencoder
from dydit.latents.decode import decode_latents, png_grid

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(vae_folder: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(vae_folder, tmp_path / "vae"))


def test_posterior_and_decode_are_those_of_diffusers(autoencoder: Autoencoder) -> None:
    network, images = tiny_vae(), torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        theirs = network.encode(images).latent_dist
        back = network.decode(theirs.mean).sample
    mean, std = autoencoder.posterior(images)
    assert torch.equal(mean, theirs.mean) and torch.equal(std, theirs.std)
    torch.testing.assert_close(autoencoder.decode(mean * 0.18215), back)


def test_facts(autoencoder: Autoencoder, vae_folder: Path) -> None:
    assert (autoencoder.scaling_factor, autoencoder.shift, autoencoder.channels) == (0.18215, 0.0, 4)
    assert autoencoder.downsampling == 2 and autoencoder.latent_shape(SIDE) == (4, 8, 8)
    assert load_autoencoder(str(vae_folder), "cpu").sha256 == autoencoder.sha256
    assert not any(parameter.requires_grad for parameter in autoencoder.network.parameters())
    with pytest.raises(ShapeError, match=r"15 × 15 .* downsamples by 2; expected a multiple of 2; use 16"):
        autoencoder.latent_shape(15)
    with pytest.raises(ShapeError, match="latents of 3 channels; expected the autoencoder's 4"):
        autoencoder.decode(torch.zeros(1, 3, 8, 8))


def test_scale_and_shift_come_from_the_config(tmp_path: Path) -> None:
    tiny_vae(scaling_factor=1.5, shift_factor=0.25).save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path, "cpu")
    assert (loaded.scaling_factor, loaded.shift) == (1.5, 0.25)
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(loaded.decode((z - 0.25) * 1.5), loaded.network.decode(z).sample)


def test_a_pipeline_keeps_it_in_a_subfolder(
    vae_folder: Path, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    shutil.copytree(vae_folder, tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_autoencoder(tmp_path, "cpu").sha256 == autoencoder.sha256


def test_old_names_of_the_attention_layers(copy: Path, autoencoder: Autoencoder) -> None:
    """As in the published files of stabilityai/sd-vae-ft-*."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(copy / WEIGHTS).items():
        for new, was in old.items() if "attentions" in name else ():
            name = name.replace(new, was)
        tensors[name] = tensor
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, copy / WEIGHTS)
    assert load_autoencoder(copy, "cpu").sha256 == autoencoder.sha256


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_weights(f, **{"encoder.conv_in.bias": None}), "lack encoder.conv_in.bias"),
        (lambda f: change_weights(f, foo=torch.ones(1)), "also have foo"),
        (lambda f: change_weights(f, **{"encoder.conv_in.bias": torch.ones(5)}), "encoder.conv_in.bias"),
        (lambda f: change_weights(f, **{"encoder.conv_in.bias": torch.full((8,), torch.nan)}), "not finite"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "cannot be loaded"),
        (lambda f: (f / WEIGHTS).unlink(), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
        (lambda f: change_config(f, _class_name="UNet2DModel"), "is a UNet2DModel; expected an Auto"),
        (lambda f: change_config(f, latents_mean=[0.0] * 4), "a mean and scale per channel"),
        (lambda f: change_config(f, block_out_channels=[8, 32]), "cannot be loaded"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused(
    copy: Path, damage: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(copy)
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match=message):
        load_autoencoder(copy, "cpu")
    assert not caplog.records


def test_other_channels_than_colours_are_refused(tmp_path: Path) -> None:
    tiny_vae(in_channels=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="1 input and 3 output channels"):
        load_autoencoder(tmp_path, "cpu")


def test_nothing_there(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        with pytest.raises(CheckpointError, match="no autoencoder at .*nowhere"):
            load_autoencoder(name)


class Hub:
    """Stands in for the Hub: which names have an autoencoder in which subfolder."""

    def __init__(self, folder: Path, subfolder: str | None) -> None:
        self.folder, self.subfolder = folder, subfolder
        self.real = {name: getattr(AutoencoderKL, name) for name in ("load_config", "from_pretrained")}
        self.asked: list[tuple[str, str | None]] = []

    def call(self, method: str, name: str, subfolder: str | None = None, **options: Any) -> Any:
        if name == str(self.folder):  # from within diffusers
            return self.real[method](name, **options)
        self.asked.append((name, subfolder))
        if subfolder != self.subfolder:
            try:
                raise EntryNotFoundError("404")
            except EntryNotFoundError:
                raise OSError(f"{name} does not appear to have a file named config.json.")  # noqa: B904
        return self.real[method](str(self.folder), **options)


@pytest.mark.parametrize("subfolder", [None, "vae"])
def test_hub_ids_go_to_diffusers(
    vae_folder: Path, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch, subfolder: str | None
) -> None:
    hub = Hub(vae_folder, subfolder)
    for method in hub.real:
        monkeypatch.setattr(AutoencoderKL, method, lambda name, m=method, **o: hub.call(m, name, **o))
    loaded = load_autoencoder("stabilityai/sd-vae-ft-mse", "cpu")
    assert (loaded.name, loaded.sha256) == ("stabilityai/sd-vae-ft-mse", autoencoder.sha256)
    assert set(hub.asked) >= {("stabilityai/sd-vae-ft-mse", subfolder)}


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: Any) -> Any:
        raise OSError("We couldn't connect\nand more")

    monkeypatch.setattr(AutoencoderKL, "load_config", fail)
    with pytest.raises(
        CheckpointError, match=r"nor to be fetched from the Hub\): We couldn't connect; check"
    ):
        load_autoencoder("stabilityai/sd-vae-ft-mse")


def test_decoding_in_parts_is_decoding_at_once(autoencoder: Autoencoder) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode_latents(autoencoder, latents, 2), autoencoder.decode(latents))
    latents[1] = torch.nan
    with pytest.raises(DataError, match="1 of 3 decoded images are not finite"):
        decode_latents(autoencoder, latents)


def test_a_grid_shows_minus_one_to_one_as_black_to_white() -> None:
    images = torch.stack([torch.full((3, 64, 64), value) for value in (-3.0, 0.0, 1.0)])
    with Image.open(io.BytesIO(png_grid(images, columns=2))) as picture:
        assert picture.size == (2 * 66 + 2, 2 * 66 + 2)
        assert [picture.getpixel(at)[0] for at in ((30, 30), (100, 30), (30, 100))] == [0, 128, 255]
    for channels in (1, 2, 4):
        with Image.open(io.BytesIO(png_grid(torch.zeros(1, channels, 8, 8), 1))) as picture:
            assert picture.size == (64, 64)
