"""Prints the folder of nnU-Net's trainers."""

from pathlib import Path

print(Path(__file__).with_name("trainers"))
