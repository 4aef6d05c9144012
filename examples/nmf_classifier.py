"""A small image classifier whose context layer is an NMF: no medicine, no MONAI, one CPU, some seconds.

The task needs context. Every image is noise in which four copies of one of three small patterns are hidden
at random places; the class is the pattern. A layer that writes the whole image as a few nonnegative
components finds what repeats, as in "Is attention better than matrix decomposition?" (Geng et al., ICLR
2021), where such a layer takes the place of attention.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import factorizer_kernels as fk


class NMFBlock(nn.Module):
    """x + W2 NMF(relu(W1 x)): channels and places of an image as one low-rank nonnegative matrix.

    x (B, C, H, W) -> (B, C, H, W). The matrix of an image is C x HW, so a component is a mixture of
    channels and how much of it each place holds.
    """

    def __init__(self, channels: int, size: tuple[int, int], rank: int, num_iters: int = 4):
        super().__init__()
        self.into = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.num_iters = num_iters
        # Where the factors start: drawn once, kept with the weights, shared by all images.
        self.register_buffer("u0", torch.rand(channels, rank))
        self.register_buffer("v0", torch.rand(size[0] * size[1], rank))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.into(x)).flatten(2)
        z = fk.nmf(z, self.u0, self.v0, solver="mu", num_iters=self.num_iters)
        return x + self.out(z.unflatten(2, x.shape[2:]))


class Classifier(nn.Module):
    """Two convolutions, an NMF block, the mean over the image, a linear map."""

    def __init__(self, classes: int, size: tuple[int, int] = (16, 16), channels: int = 16):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            NMFBlock(channels, size, rank=4),
            nn.ReLU(),
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


PATTERNS = torch.tensor(
    [
        [[0, 1, 0], [1, 1, 1], [0, 1, 0]],
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]],
        [[1, 1, 1], [1, 0, 0], [1, 0, 0]],
    ]
).float()


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 16, 16) and their classes."""
    classes = torch.randint(len(PATTERNS), (count,), generator=generator)
    images = 0.5 * torch.randn(count, 1, 16, 16, generator=generator)
    for image, pattern in zip(images, PATTERNS[classes], strict=True):
        for row, column in torch.randint(14, (4, 2), generator=generator).tolist():
            image[0, row : row + 3, column : column + 3] += 2 * pattern
    return images, classes


def main(steps: int = 150) -> float:
    """Trains, and returns the share of 300 fresh images that are recognised."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = Classifier(len(PATTERNS))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(steps):
        images, classes = draw(32, generator)
        loss = cross_entropy(network(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    images, classes = draw(300, generator)
    with torch.no_grad():
        accuracy = (network(images).argmax(1) == classes).float().mean().item()
    print(f"accuracy on fresh images: {accuracy:.2f}; by chance 0.33")
    return accuracy


if __name__ == "__main__":
    main()
