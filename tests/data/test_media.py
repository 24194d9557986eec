"""Images and sounds of files: what they read as, and that every error names its file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from shrank.data.media import read_image, read_sound
from tests.common.model_folders import write_image, write_sound


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_images_of_every_mode_are_rgb(mode: str, tmp_path) -> None:
    path = tmp_path / "a.tif"
    Image.new(mode, (6, 4)).save(path)
    assert read_image(path).mode == "RGB" and read_image(path).size == (6, 4)


def test_images_stand_upright(tmp_path) -> None:
    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (4, 6)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_text("no image"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:60] + b"\0" * 300),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "text", "empty", "overwritten", "absent"],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif"])
def test_damaged_images_are_named(damage, suffix: str, tmp_path) -> None:
    path = write_image(tmp_path / f"a{suffix}", size=(64, 64))
    damage(path)
    with pytest.raises(ValueError, match=rf"a\{suffix}: cannot be read as an image"):
        read_image(path)


def test_sounds_are_mono_at_the_rate_that_is_wanted(tmp_path) -> None:
    time = np.arange(8000) / 8000
    left = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), 8000)
    found = read_sound(tmp_path / "a.wav", 16000)
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert found.dtype == np.float32 and found.shape == (16000,)
    assert np.abs(found - expected)[200:-200].max() < 1e-3  # the filter rings at the ends
    exact = read_sound(tmp_path / "a.wav", 8000)
    assert np.abs(exact - left / 2).max() < 1e-4


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"no sound", "cannot be read as sound"), (b"", "cannot be read as sound"), (None, "cannot be read as sound")],
)
def test_damaged_sounds_are_named(content: bytes | None, says: str, tmp_path) -> None:
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.wav: {says}"):
        read_sound(path, 16000)


def test_a_sound_without_samples_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a\.wav: holds no sound"):
        read_sound(write_sound(tmp_path / "a.wav", seconds=0.0), 16000)


@pytest.mark.parametrize(
    ("package", "says"),
    [
        ("PIL", r"shrank\[vision\]"),
        ("soundfile", r"shrank\[audio\]"),
        ("soxr", r"8000 samples a second.*shrank\[audio\]"),
    ],
)
def test_missing_packages_are_named(package: str, says: str, tmp_path: Path, monkeypatch) -> None:
    image, sound = write_image(tmp_path / "a.png"), write_sound(tmp_path / "a.wav", rate=8000)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=says):
        read_image(image) if package == "PIL" else read_sound(sound, 16000)
