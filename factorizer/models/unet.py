"""A U-net with an exchangeable stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorizer_kernels.shared.checks import integer, integers, one_of, plain_tensor

from ..layers.block import FactorizerStage
from ..layers.checks import check_dtype, check_features
from ..layers.conv import CONV, CONV_TRANSPOSE, ConvStage, can_join, join
from ..layers.head import SubvoxelHead
from ..layers.parts import Part, build, has_hooks, untouched
from ..layers.resize import crop_to, pad_to, round_up

#: Heads that num_deep_supr=True stands for: the loss weights of the recipes are 1, 1/2 and 1/4.
DEEP_SUPERVISION_HEADS = 3

Size = tuple[int, ...]


class Encoder(nn.Module):
    """Levels from fine to coarse; returns the features of each, finest first."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, overwrite: bool = False) -> list[Tensor]:
        """x (B, C, S1..Sp) to the features of each level, finest first.

        `overwrite`: nobody else reads x, or what is computed on the way.
        """
        features: list[Tensor] = []
        for block in self.blocks:
            x = block(x, overwrite, not features) if overwrite else block(x)
            features.append(x)
        return features


class EncoderBlock(nn.Module):
    """Downsampling, then a stage."""

    def __init__(self, downsample: nn.Module, block: nn.Module, stride: Size) -> None:
        super().__init__()
        self.downsample = downsample
        self.block = block
        self.stride = stride

    def forward(self, x: Tensor, overwrite: bool = False, last_use: bool = False) -> Tensor:
        """x (B, C, S1..Sp) to (B, width, ceil(S1 / stride)..).

        `overwrite`: nobody else reads what is computed on the way; `last_use`: nor x.
        """
        y = self.downsample(pad_to(x, round_up(x.shape[2:], self.stride)))
        if overwrite and type(self.block) is FactorizerStage and (last_use or not _share_memory(x, y)):
            return self.block(y, True)
        return self.block(y)


class Decoder(nn.Module):
    """Levels from coarse to fine; returns the outputs of the finest, finest first.

    Consumes the list of the encoder's features, so that each is freed as soon as it is used.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features: list[Tensor], count: int, overwrite: bool = False) -> list[Tensor]:
        """The encoder's features, finest first, to the outputs of the `count` finest levels, finest first;
        that of the coarsest level is its features.

        `overwrite`: nobody else reads the features, or what is computed on the way.
        """
        outputs = [features.pop()]
        block: Any
        for level, block in zip(reversed(range(len(self.blocks))), self.blocks, strict=True):
            maps = [outputs[0] if level + 1 < count else outputs.pop(0), features.pop()]
            outputs.insert(0, block.take(maps, True) if overwrite else block(*maps))
        return outputs


class DecoderBlock(nn.Module):
    """Upsampling, cropped to the skip's size, concatenation of [skip, upsampled], then a stage.

    A stage that begins with a `Linear` of its own, `adapter`, and has the rest as `after_adapter`, takes
    the first two and the adapter as one operator where the upsampling is a transposed convolution by blocks.
    """

    def __init__(self, upsample: nn.Module, block: nn.Module, stride: Size) -> None:
        super().__init__()
        self.upsample = upsample
        self.block = block
        self.stride = stride

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C, S1..Sp) and the finer skip (B, width, T1..Tp) to (B, width, T1..Tp)."""
        return self.take([x, skip])

    def take(self, maps: list[Tensor], overwrite: bool = False) -> Tensor:
        """`forward` of [x, skip]; takes them out of the list, so that each is freed after its last use.

        `overwrite`: nobody else reads skip, or what is computed on the way.
        """
        x, skip = maps
        maps.clear()
        block: Any = self.block
        adapter: Any = getattr(block, "adapter", None)
        size = tuple(skip.shape[2:])
        if not can_join(self.upsample, adapter) or not _begins_with_its_adapter(block):
            return block(torch.cat([skip, crop_to(self.upsample(x), size)], 1))
        overwrite = overwrite and type(block) is FactorizerStage and not _share_memory(x, skip)
        fitted = round_up(size, self.stride)
        y = join(pad_to(skip, fitted), x, self.upsample, adapter, overwrite)
        del x, skip
        if fitted != size:
            y = crop_to(y, size).contiguous()
        return block.after_adapter(y, True) if overwrite else block.after_adapter(y)


class UNet(nn.Module):
    """Stem, encoder, decoder with skip connections, and one or several heads.

    x (B, in_channels, S1..Sp) of any spatial size gives logits (B, out_channels, S1..Sp). Where a stride
    does not divide the size of the level above, that level's features are padded with zeros at the end of
    the axis on the way down, and what comes up again is cropped. For the stem and the finest level it is x
    that is padded, and the logits are cropped. A size that fits is left as it is.

    Args:
        in_channels, out_channels: channels of the input and of the logits.
        spatial_dims: number of spatial axes, 1 to 3.
        spatial_size: S1..Sp, for stages that are made for a size.
        encoder_depth: depth of the stage of each encoder level, finest first.
        encoder_width: channels of each encoder level.
        strides: stride by which each level is coarser than the one above; an int or one int per
            axis.
        decoder_depth: depth of the stage of each decoder level, coarsest first; one level fewer
            than the encoder.
        stem: part, called with (in_channels, encoder_width[0]). Default: convolution, stem_stride + 2 along
            each axis, padding 1, no bias.
        stem_stride: stride of the stem; an int or one int per axis. The stages work on a grid so much coarser
            than the input's, and each head makes its own as much finer.
        downsample: part, called with (channels, channels, kernel_size=stride, stride=stride).
            Default: convolution. Left out where neither channels nor size change.
        block: part, called with (in_channels, out_channels, spatial_size, depth=depth), for every
            stage. Default: `ConvStage`.
        upsample: part, called as downsample. Default: transposed convolution.
        head: part, called with (channels, out_channels, kernel_size=1). Default: convolution, and with a
            stem_stride `SubvoxelHead`.
        num_deep_supr: deep supervision: False or 0 for one head and a tensor, n for n heads on the
            n finest levels and a list of their logits, finest first; True for three.
        bottleneck: part for the stage of the coarsest level; `block` where None.

    Attributes:
        strides: voxels of x along each axis that one of each level's features stands for, finest first.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_dims: int = 3,
        spatial_size: Sequence[int] | None = None,
        encoder_depth: Sequence[int] = (1, 1, 1, 1, 1),
        encoder_width: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2, 2),
        decoder_depth: Sequence[int] = (1, 1, 1, 1),
        stem: Part | None = None,
        downsample: Part | None = None,
        block: Part | None = None,
        upsample: Part | None = None,
        head: Part | None = None,
        num_deep_supr: bool | int = False,
        bottleneck: Part | None = None,
        stem_stride: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.spatial_dims = one_of("spatial_dims", spatial_dims, (1, 2, 3))
        encoder_width = integers("encoder_width", encoder_width, 1, range(1, 33))
        levels = len(encoder_width)
        encoder_depth = integers("encoder_depth", encoder_depth, 1, (levels,))
        decoder_depth = integers("decoder_depth", decoder_depth, 1, (levels - 1,))
        steps = _steps(strides, levels, spatial_dims)
        axes = stem_stride if isinstance(stem_stride, Sequence) else [stem_stride] * spatial_dims
        fine = integers("stem_stride", axes, 1, (spatial_dims,))
        below = [_product(steps[: i + 1]) for i in range(levels)]
        self.strides = [_product([fine, stride]) for stride in below]
        self._below = below  # the same on the finest level's grid
        # The finest level, whose maps are the largest, is never padded on the way down.
        self._divisor = _product([fine, *steps[:2]])
        sizes: list[Size | None] = [None] * levels
        if spatial_size is not None:
            size = integers("spatial_size", spatial_size, 1, (spatial_dims,))
            fitted = _divide_up(round_up(size, self._divisor), fine)
            sizes = [_divide_up(fitted, stride) for stride in below]

        conv = CONV[spatial_dims]
        if stem is None:
            kernel = tuple(s + 2 for s in fine)
            stem = (conv, {"kernel_size": kernel, "stride": fine, "padding": 1, "bias": False})
        downsample = conv if downsample is None else downsample
        upsample = CONV_TRANSPOSE[spatial_dims] if upsample is None else upsample
        if head is None:
            coarse = any(s > 1 for s in fine)
            head = (SubvoxelHead, {"scale": fine, "spatial_dims": spatial_dims}) if coarse else conv
        block = (ConvStage, {"spatial_dims": spatial_dims}) if block is None else block
        bottleneck = block if bottleneck is None else bottleneck

        self.stem = build("stem", stem, in_channels, encoder_width[0])
        encoder = []
        for i, (step, width) in enumerate(zip(steps, encoder_width, strict=True)):
            above = encoder_width[max(i - 1, 0)]
            down: nn.Module = nn.Identity()
            if width != above or any(s != 1 for s in step):
                down = build("downsample", downsample, above, width, kernel_size=step, stride=step)
            part = bottleneck if i == levels - 1 else block
            stage = build("block", part, width, width, sizes[i], depth=encoder_depth[i])
            encoder.append(EncoderBlock(down, stage, step))
        self.encoder = Encoder(encoder)
        decoder = []
        for i, depth in zip(reversed(range(levels - 1)), decoder_depth, strict=True):
            width, step = encoder_width[i], steps[i + 1]
            up = build("upsample", upsample, encoder_width[i + 1], width, kernel_size=step, stride=step)
            stage = build("block", block, 2 * width, width, sizes[i], depth=depth)
            decoder.append(DecoderBlock(up, stage, step))
        self.decoder = Decoder(decoder)

        if isinstance(num_deep_supr, bool):
            num_heads = DEEP_SUPERVISION_HEADS if num_deep_supr else 0
        else:
            num_heads = integer("num_deep_supr", num_deep_supr)
        if num_heads > levels:
            raise ValueError(
                f"num_deep_supr must be at most {levels}, one head for each level, got {num_deep_supr} "
                f"(True stands for {DEEP_SUPERVISION_HEADS})"
            )
        heads = [
            build("head", head, encoder_width[i], out_channels, kernel_size=1) for i in range(num_heads or 1)
        ]
        if num_heads:
            self.heads = nn.ModuleList(heads)
        else:
            self.head = heads[0]
        self.num_deep_supr = num_heads

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """x (B, in_channels, S1..Sp) to logits (B, out_channels, S1..Sp), or a list of those of each head."""
        check_features(type(self).__name__, x, self.in_channels, self.spatial_dims)
        if untouched(self.stem, *CONV.values()):  # one that is sharded by itself converts x on its own
            check_dtype(x, self.stem.weight)
        x = plain_tensor(x)
        size = x.shape[2:]
        # Without a name of their own here, maps are freed after their last use.
        y = self.stem(pad_to(x, round_up(size, self._divisor)))
        overwrite = self._unwatched() and self._keeps_nothing() and not _share_memory(x, y)
        features = [y]
        del y
        heads = self.heads if self.num_deep_supr else [self.head]
        outputs = self.decoder(self.encoder(features.pop(), overwrite), len(heads), overwrite)
        logits = [
            crop_to(head(y), _divide_up(size, stride))
            for head, y, stride in zip(heads, outputs, self._below, strict=False)
        ]
        return logits if self.num_deep_supr else logits[0]

    def _unwatched(self) -> bool:
        """Whether nobody sees the maps between: nothing is differentiated, compiled or traced, no part has a
        hook."""
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # one graph, with gradients and without
            or torch._C._are_functorch_transforms_active()
            or any(map(has_hooks, self.modules()))
        )

    def _keeps_nothing(self) -> bool:
        """Whether no part can keep a map that it returns, which others write over then: all are known."""
        blocks: Any = [*self.encoder.blocks, *self.decoder.blocks]
        return untouched(self.stem, *CONV.values()) and all(
            (isinstance(block, DecoderBlock) or untouched(block.downsample, nn.Identity, *CONV.values()))
            and (getattr(block.block, "keeps_nothing", False) or untouched(block.block, ConvStage))
            for block in blocks
        )


def _begins_with_its_adapter(stage: Any) -> bool:
    """Whether a stage's `after_adapter` and its `adapter` are its forward."""
    kind: Any = next(kind for kind in type(stage).__mro__ if "after_adapter" in vars(kind))
    return type(stage).forward is kind.forward and not has_hooks(stage)


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _steps(strides: Sequence[int | Sequence[int]], levels: int, axes: int) -> list[Size]:
    """The stride of every level along every axis."""
    if isinstance(strides, str) or not isinstance(strides, Sequence) or len(strides) != levels:
        raise ValueError(
            f"strides must have {levels} entries, one for each level of encoder_width, got {strides!r}"
        )
    return [
        integers(f"strides[{i}]", s if isinstance(s, Sequence) else [s] * axes, 1, (axes,))
        for i, s in enumerate(strides)
    ]


def _product(factors: Sequence[Size]) -> Size:
    product = [1] * len(factors[0])
    for factor in factors:
        product = [p * f for p, f in zip(product, factor, strict=True)]
    return tuple(product)


def _divide_up(size: Sequence[int], divisor: Size) -> Size:
    return tuple(-(-s // d) for s, d in zip(size, divisor, strict=True))
