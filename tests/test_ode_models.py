"""Models made of differential equations, as the field has them, against torchdiffeq: outputs, and the gradients of every parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from seqparc.ode import Path, solve

T = torch.linspace(0, 1, 10, dtype=torch.float64)
B, F = 3, 2  # samples, features
X = torch.randn(10, B, F, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class GRUODE(nn.Module):
    """dh/dt = (1 - z) (g - h) with inputs (De Brouwer et al. 2019)."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.gates, self.new = nn.Linear(F + n, 2 * n), nn.Linear(F + n, n)

    def forward(self, t: Tensor, h: Tensor, x: Tensor) -> Tensor:
        r, z = torch.sigmoid(self.gates(torch.cat((x, h), -1))).chunk(2, -1)
        return (1 - z) * (torch.tanh(self.new(torch.cat((x, r * h), -1))) - h)


class Controlled(nn.Module):
    """dz/dt = F(z) dX/dt, a neural controlled differential equation (Kidger et al. 2020)."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n, 5), nn.Softplus(), nn.Linear(5, n * F), nn.Tanh())

    def forward(self, t: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        return (self.net(z).unflatten(-1, (-1, F)) @ slope.unsqueeze(-1)).squeeze(-1)


class Hamiltonian(nn.Module):
    """dq/dt = ∂H/∂p, dp/dt = -∂H/∂q (Greydanus et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.requires_grad_(True)
            (slope,) = torch.autograd.grad(self.energy(y).sum(), y, create_graph=True)
        dq, dp = slope.chunk(2, -1)
        return torch.cat((dp, -dq), -1)


class Latent(nn.Module):
    """An encoder that runs backwards over what was seen, a latent path that starts from a sample of its result, and a decoder (Chen et al.
    2018, Rubanova et al. 2019)."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.encoder, self.mean = nn.GRU(F, 4), nn.Linear(4, 2 * n)
        self.field = nn.Sequential(nn.Linear(n, 5), nn.ELU(), nn.Linear(5, n))
        self.decoder = nn.Linear(n, F)

    def forward(self, run, x: Tensor) -> Tensor:
        _, h = self.encoder(x.flip(0))
        mean, spread = self.mean(h[0]).chunk(2, -1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=mean.dtype)
        return self.decoder(run(lambda t, z: self.field(z), mean + spread.exp() * noise, T))


def ours(func, y0: Tensor, t: Tensor, x=None) -> Tensor:
    return solve(func, y0, t, x, options={"backend": "torch"})


def theirs(func, y0: Tensor, t: Tensor, x=None) -> Tensor:
    return odeint(func if x is None else lambda t, y: func(t, y, x(t[None])[0]), y0, t, method="rk4")


PATH = Path(T, X, "cubic")
MODELS = {
    "GRU-ODE": (GRUODE, lambda m, run: run(m, torch.zeros(B, 4, dtype=T.dtype), T, PATH)),
    "controlled": (Controlled, lambda m, run: run(m, torch.ones(B, 4, dtype=T.dtype), T, PATH.derivative)),
    "Hamiltonian": (Hamiltonian, lambda m, run: run(m, torch.cat((X[0], X[1]), -1), T)),
    "latent": (Latent, lambda m, run: m(run, X)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_learn_the_same(name):
    torch.manual_seed(0)
    make, call = MODELS[name]
    model = make().double()
    results = [call(model, run) for run in (ours, theirs)]
    weights = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(2), dtype=T.dtype)
    # What only shifts an energy has no gradient at all.
    wanted, found = (torch.autograd.grad((weights * y).sum(), list(model.parameters()), allow_unused=True) for y in reversed(results))
    assert float((results[0] - results[1]).detach().abs().max()) < 1e-10
    for p, q in zip(found, wanted, strict=True):
        p, q = (torch.zeros(1) if g is None else g for g in (p, q))
        assert float((p - q).abs().max()) < 1e-10
