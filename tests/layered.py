"""A model of blocks in lists, as transformers are, with what is awkward about them."""

import torch
from torch import Tensor, nn

from tests import tiny


class Layer(nn.Module):
    """query and value share their input, `again` runs twice; `gate` is the model's for all.

    Nobody uses its last output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.value = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)

    def forward(
        self, x: Tensor, scale: float, *, gate: dict[str, Tensor]
    ) -> tuple[Tensor, str, Tensor]:
        inner = torch.tanh(x)
        mixed = torch.tanh(self.query(inner)) * self.value(inner) * gate["gate"]
        return x + scale * self.again(torch.tanh(self.again(mixed))), "constant", mixed


class LayeredNet(nn.Module):
    """Two lists of layers; the output of the first is also read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(6, 6)
        self.first = nn.ModuleList(Layer() for _ in range(2))
        self.second = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.scale = self.last_scale = 0.5

    def forward(self, features: Tensor) -> tiny.Output:
        gate = {"gate": torch.sigmoid(self.gates(features))}
        x = features
        for layer in self.first:
            x, *_ = layer(x, self.scale, gate=gate)
        middle = x
        for layer, scale in zip(self.second, (self.scale, self.last_scale), strict=True):
            x, *_ = layer(x, scale, gate=gate)
        return tiny.Output(self.head((x + middle).mean(dim=1)))


class Link(nn.Module):
    """A layer that does not save what it reads for its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.own(torch.tanh(x))


class Chain(nn.Module):
    """Eight layers, each of which reads what the one before answers, and nobody else does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Link() for _ in range(8))
        self.head = nn.Linear(6, 3)

    def run(self, x: Tensor) -> list[Tensor]:
        """All that is used at the end."""
        for layer in self.layers:
            x = layer(x)
        return [x]

    def forward(self, features: Tensor) -> tiny.Output:
        used = torch.stack(self.run(features)).sum(dim=0)
        return tiny.Output(self.head(0.1 * used.mean(dim=1)))


class Collecting(Chain):
    """What layers answer is also used at the end, through a view or beside the graph."""

    def run(self, x: Tensor) -> list[Tensor]:
        used = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            used.append(x.flatten(1).view(x.shape) if number % 2 else x.detach())
        return used
