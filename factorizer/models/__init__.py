"""Networks."""

from .factorizer import Factorizer
from .presets import PRESETS, preset
from .unet import UNet

__all__ = ["PRESETS", "Factorizer", "UNet", "preset"]
