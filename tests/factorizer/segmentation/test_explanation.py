"""Components put back into the volume, and their agreement with a mask."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from factorizer import FactMixer, Factorizer, LayerNorm, SWMatricize
from factorizer.segmentation.explanation import (
    ComponentMaps,
    agreement,
    clearest,
    clearest_channel,
    component_maps,
    mixers,
)

WINDOWS = {"head_dim": 8, "patch_size": 4}


def mixer_for(shifts, **options):
    torch.manual_seed(0)
    reshape = (SWMatricize, {**WINDOWS, "shifts": shifts})
    return FactMixer(16, 16, (8, 8, 8), reshape=reshape, **options).double()


def features(*size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 16, *size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shifts", [(None,), (2,)])
@pytest.mark.parametrize("size", [(8, 8, 8), (12, 8, 4), (7, 9, 8)])
def test_rank_one_component_is_the_length_of_what_is_put_back(shifts, size):
    mixer, x = mixer_for(shifts, rank=1), features(*size)
    maps = component_maps(mixer, x)
    y = mixer.reshape(mixer.act(mixer.in_proj(x)))
    y = mixer.reshape.inverse_forward(mixer.factorize(y), size)
    # One shift and rank 1: a head's output at a voxel is u v, whose length is the component.
    lengths = torch.linalg.vector_norm(y.unflatten(1, (2, 8)), dim=2)
    assert maps.shape == (2, 2, *size)
    torch.testing.assert_close(maps, lengths)


def test_components_are_averaged_over_shifts():
    x = features(8, 8, 8)
    both = component_maps(mixer_for((None, 2), rank=1), x)
    each = [component_maps(mixer_for((shift,), rank=1), x) for shift in (None, 2)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_higher_rank_gives_rank_maps_a_head():
    maps = component_maps(mixer_for((None, 2), rank=3), features(8, 8, 8))
    assert maps.shape == (2, 6, 8, 8, 8)
    assert (maps >= 0).all()
    assert maps.isfinite().all()


@pytest.mark.parametrize("size", [(10, 9, 13), (16, 24, 8), (3, 5, 9)])
def test_maps_of_coarse_levels_lie_where_their_features_do(size):
    """Whether or not the strides divide the size: so many voxels for each feature, from the first on."""
    torch.manual_seed(0)
    network = Factorizer(
        1,
        2,
        (16, 16, 16),
        (1, 1, 1),
        (8, 8, 8),
        strides=(1, 2, 2),
        decoder_depth=(1, 1),
        stem_stride=(2, 2, 1),
        norm=LayerNorm,
        reshape=(SWMatricize, {"head_dim": 4, "patch_size": 2}),
    )
    strides = {
        "encoder.blocks.0": (2, 2, 1),
        "encoder.blocks.1": (4, 4, 2),
        "encoder.blocks.2": (8, 8, 4),
        "decoder.blocks.0": (4, 4, 2),
        "decoder.blocks.1": (2, 2, 1),
    }
    inputs = []
    for name, mixer in mixers(network).items():
        mixer.register_forward_pre_hook(lambda mixer, args, name=name: inputs.append((name, mixer, args[0])))
    components = ComponentMaps(network, list(mixers(network)))
    maps = components(torch.randn(1, 1, *size)).split(list(components.counts.values()), 1)
    for (name, mixer, x), found in zip(inputs[: len(maps)], maps, strict=True):
        stride = next(stride for level, stride in strides.items() if name.startswith(level))
        expected = interpolate(component_maps(mixer, x), scale_factor=stride, mode="trilinear")
        torch.testing.assert_close(found, expected[..., : size[0], : size[1], : size[2]])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Factorizer(
        1,
        2,
        (16, 16, 16),
        encoder_depth=(1, 1),
        encoder_width=(16, 32),
        strides=(1, 2),
        decoder_depth=(1,),
        norm=LayerNorm,
        reshape=(SWMatricize, WINDOWS),
    ).eval()


def test_component_maps_of_a_network(network):
    names = list(mixers(network))
    assert len(names) == 3
    maps = ComponentMaps(network, names[:2])
    x = torch.randn(1, 1, 16, 16, 16)
    found = maps(x)
    assert list(maps.counts.values()) == [2, 4]
    assert found.shape == (1, 6, 16, 16, 16)
    inputs = []
    hook = mixers(network)[names[0]].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    network(x)
    hook.remove()
    torch.testing.assert_close(found[:, :2], component_maps(mixers(network)[names[0]], inputs[0]))
    assert not any(mixer._forward_pre_hooks for mixer in mixers(network).values())


def test_an_unknown_layer_is_named(network):
    with pytest.raises(ValueError, match="no 'nowhere'"):
        ComponentMaps(network, ["nowhere"])


def test_agreement_is_the_probability_of_the_right_order():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 6, 60))  # many ties
    mask = torch.from_numpy(rng.random(60) < 0.3)
    inside, outside = scores[mask][:, None], scores[~mask][None]
    expected = ((inside > outside).double() + 0.5 * (inside == outside).double()).mean()
    assert agreement(scores, mask).auc == pytest.approx(expected.item(), abs=1e-12)
    assert agreement(mask.float(), mask).auc == 1
    assert agreement(-mask.float(), mask).auc == 0
    assert agreement(torch.ones(60), mask).auc == 0.5
    assert math.isnan(agreement(scores, torch.zeros(60)).auc)
    assert math.isnan(agreement(scores, torch.ones(60)).auc)


def test_best_dice_is_that_of_the_best_threshold():
    rng = np.random.default_rng(1)
    scores = torch.from_numpy(rng.integers(0, 6, 60))
    mask = torch.from_numpy(rng.random(60) < 0.3)
    for sign in (1, -1):  # one of them has an AUC below 1/2, and so marks the outside
        found = agreement(sign * scores, mask)
        high = sign if found.marks == "label" else -sign
        by_threshold = {
            t: float(2 * ((high * scores >= t) & mask).sum() / ((high * scores >= t).sum() + mask.sum()))
            for t in (high * scores).unique().tolist()
        }
        assert found.dice == pytest.approx(max(by_threshold.values()))
        assert by_threshold[high * sign * int(found.threshold)] == pytest.approx(found.dice)
    assert agreement(mask.float(), mask)[1:] == (1, 1)


def test_a_component_of_the_outside_tells_the_label_as_well():
    mask = torch.arange(8) < 3
    inside, outside = agreement(mask.float(), mask), agreement(1 - mask.float(), mask)
    assert (inside.auc, outside.auc) == (1, 0)
    assert (inside.marks, outside.marks) == ("label", "outside")
    assert inside.clarity == outside.clarity == 0.5
    assert outside[1:] == (1, 0)  # the label is where map <= 0
    assert agreement(mask.float(), mask & False).marks == ""
    areas = torch.tensor([[0.7, 0.1, math.nan], [0.6, 0.5, 0.9], [math.nan] * 3])
    assert clearest(areas)[:2] == [1, 2]


def test_the_channel_that_shows_the_classes_best():
    rng = np.random.default_rng(0)
    image = rng.normal(0, 1, (8, 8, 8, 3)).astype(np.float32)
    mask = np.zeros((8, 8, 8), bool)
    mask[2:5, 2:5, 2:5] = True
    image[mask, 1] += 1
    image[mask, 2] -= 3  # dark shows as well as bright
    everywhere = np.ones_like(mask)
    assert clearest_channel(image, [mask], everywhere) == 2
    image[~mask, 2] = image[mask, 2].mean()
    image[4:, :, :, 0] += 9
    assert clearest_channel(image, [mask, image[..., 0] > 5], mask | (image[..., 0] > 5)) == 0
    assert clearest_channel(image, [mask & False], everywhere) == 0
