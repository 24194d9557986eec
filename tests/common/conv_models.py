"""Small models of architectures with convolutions; random weights from a fixed seed, but for the trained CREPE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    ConvNextV2Config,
    ConvNextV2Model,
    MambaConfig,
    MambaModel,
    MobileNetV2Config,
    MobileNetV2Model,
    ResNetConfig,
    ResNetModel,
    VideoMAEConfig,
    VideoMAEModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from benchmarks.data.crepe import WINDOW, load_crepe
from tests.common.models import VOCAB, draw, seeded, tokens, with_statistics

_WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


class UNetBlock(nn.Module):
    """Down and up again with a skip connection, as diffusion models have it; x: (batch, 16, height, width), even."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = self._block(16, 32)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.middle = self._block(64, 64)
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.leave = self._block(64, 32)
        self.skip = nn.Conv2d(16, 32, 1)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    @staticmethod
    def _block(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        high = self.enter(x)
        low = self.up(self.middle(self.down(high)))
        return self.last(self.leave(torch.cat([high, low], 1)) + self.skip(x))


def video_net() -> nn.Sequential:
    """Convolutions over (batch, 3, frames, height, width), one of them in groups."""
    return nn.Sequential(
        nn.Conv3d(3, 32, 3, padding=1),
        nn.BatchNorm3d(32),
        nn.ReLU(),
        nn.Conv3d(32, 64, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), groups=2),
        nn.BatchNorm3d(64),
        nn.ReLU(),
        nn.Conv3d(64, 64, (3, 1, 1), dilation=(2, 1, 1), padding="same"),
        nn.ReLU(),
        nn.Conv3d(64, 32, 1),
    )


def wav2vec2() -> Wav2Vec2Model:
    return Wav2Vec2Model(
        Wav2Vec2Config(
            **_WIDTHS,
            conv_dim=(32, 64, 64),
            conv_kernel=(10, 3, 2),
            conv_stride=(5, 2, 2),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=3,
            layerdrop=0.0,
            mask_time_prob=0.0,
        )
    )


@dataclass(frozen=True)
class ConvModel:
    """`build` gives the model, `x` its input, `formats` the memory formats beside the contiguous one that fit it."""

    build: Callable[[], nn.Module]
    x: Tensor
    formats: tuple[torch.memory_format, ...] = ()
    trained: bool = False

    def make(self) -> nn.Module:
        return self.build() if self.trained else with_statistics(seeded(self.build))


_IMAGE, _LAST, _LAST_3D = draw(2, 3, 32, 32), (torch.channels_last,), (torch.channels_last_3d,)
MODELS = {
    "crepe": ConvModel(lambda: load_crepe("tiny"), draw(2, WINDOW), _LAST, trained=True),
    "resnet": ConvModel(
        lambda: ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2])), _IMAGE, _LAST
    ),
    "convnextv2": ConvModel(
        lambda: ConvNextV2Model(ConvNextV2Config(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2)), _IMAGE, _LAST
    ),
    "mobilenetv2": ConvModel(lambda: MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.5)), _IMAGE, _LAST),
    "unet": ConvModel(UNetBlock, draw(2, 16, 16, 16), _LAST),
    "wav2vec2": ConvModel(wav2vec2, draw(2, 800)),
    "whisper": ConvModel(
        lambda: WhisperEncoder(
            WhisperConfig(
                num_mel_bins=16,
                d_model=64,
                encoder_layers=1,
                encoder_attention_heads=2,
                encoder_ffn_dim=128,
                max_source_positions=20,
            )
        ),
        draw(2, 16, 40),
    ),
    "videomae": ConvModel(
        lambda: VideoMAEModel(VideoMAEConfig(**_WIDTHS, image_size=16, patch_size=8, num_frames=4)),
        draw(2, 4, 3, 16, 16),
        _LAST_3D,
    ),
    "video-net": ConvModel(video_net, draw(2, 3, 4, 12, 12), _LAST_3D),
    "mamba": ConvModel(
        lambda: MambaModel(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)),
        tokens(2, 8),
    ),
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The tensor that a model returns, the last hidden state of a transformers one."""
    y = model(x)
    return y if isinstance(y, Tensor) else y.last_hidden_state
