"""Images and sounds of files, as arrays that processors take; pillow, soundfile and soxr are asked for when needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

IMAGES = frozenset(".bmp .gif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
SOUNDS = frozenset(".aif .aiff .flac .mp3 .oga .ogg .opus .wav".split())


def read_image(path: Path) -> Image:
    """The image of a file, upright and in RGB; ValueError names the file if it is none."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("images need pillow: pip install 'shrank[vision]'") from error
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # What pillow raises for damaged files: its decoders differ.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def read_sound(path: Path, rate: int) -> np.ndarray:
    """The sound of a file, its channels averaged, float32 (samples,) at `rate` samples a second; ValueError names the
    file if it holds none."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("sounds need soundfile: pip install 'shrank[audio]'") from error
    try:
        samples, found_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise ValueError(f"{path}: cannot be read as sound: {error}") from error
    samples = samples.mean(axis=1)
    if found_rate != rate:
        try:
            import soxr
        except ImportError as error:
            raise ImportError(
                f"{path}: has {found_rate} samples a second, and {rate} are wanted, which needs soxr: "
                "pip install 'shrank[audio]'"
            ) from error
        samples = soxr.resample(samples, found_rate, rate)
    if not len(samples):
        raise ValueError(f"{path}: holds no sound")
    return samples
