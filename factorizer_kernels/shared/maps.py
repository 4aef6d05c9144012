"""Feature maps (B, C, S1..Sp)."""


def three_axes(values, filler) -> tuple:
    """Sizes or strides of one to three spatial axes, with leading axes up to three."""
    return (filler,) * (3 - len(values)) + tuple(values)
