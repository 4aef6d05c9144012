"""The Factorizer: a U-net of Factorizer stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from factorizer_kernels.shared.checks import integers

from ..layers import FactorizerStage, PositionalEmbedding
from ..layers.parts import Part
from .unet import UNet


class Factorizer(UNet):
    """U-net whose stages are `FactorizerStage`s (Medical Image Analysis 84, 2023, 102706).

    x (B, in_channels, S1..Sp) of any spatial size gives logits (B, out_channels, S1..Sp), or a list
    of logits, finest first, with deep supervision. `spatial_size` is the size for which positional
    embedding and factors are made; for another one they are interpolated, and windows or strides
    that do not divide it are completed with zeros, see `FactMixer` and `UNet`.

    Args:
        in_channels, out_channels: channels of the input and of the logits.
        spatial_size: S1..Sp, one to three axes.
        encoder_depth, encoder_width, strides, decoder_depth: see `UNet`.
        stem, stem_stride, downsample, upsample, head, num_deep_supr: see `UNet`.
        pos_embed: part of the bottleneck, called with (channels, spatial_size).
        kwargs: arguments of `FactorizerStage`, and through it of `FactorizerBlock` (norm,
            mlp_ratio, local, dropout), `FactMixer` (reshape, act, factorize) and `NMF` (rank, num_iters,
            num_grad_steps, init, solver).

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_size: Sequence[int],
        encoder_depth: Sequence[int] = (1, 1, 1, 1, 1),
        encoder_width: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2, 2),
        decoder_depth: Sequence[int] = (1, 1, 1, 1),
        stem: Part | None = None,
        downsample: Part | None = None,
        upsample: Part | None = None,
        head: Part | None = None,
        pos_embed: Part | None = PositionalEmbedding,
        num_deep_supr: bool | int = False,
        stem_stride: int | Sequence[int] = 1,
        **kwargs: Any,
    ) -> None:
        size = integers("spatial_size", spatial_size, 1, (1, 2, 3))
        pos_embed = nn.Identity if pos_embed is None else pos_embed
        super().__init__(
            in_channels,
            out_channels,
            spatial_dims=len(size),
            spatial_size=size,
            encoder_depth=encoder_depth,
            encoder_width=encoder_width,
            strides=strides,
            decoder_depth=decoder_depth,
            stem=stem,
            downsample=downsample,
            block=(FactorizerStage, kwargs),
            upsample=upsample,
            head=head,
            num_deep_supr=num_deep_supr,
            stem_stride=stem_stride,
            bottleneck=(FactorizerStage, {**kwargs, "pos_embed": pos_embed}),
        )
