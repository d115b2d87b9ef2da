"""The method in its slow and obvious form: an autograd function for T = W ⊙ h(M), and steps by autograd or elementwise.

It shares names with the package, but no code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def h_prime(name: str, m: Tensor, slope: float) -> Tensor:
    """Return h'(m) of a straight-through estimator."""
    if name == "linear":
        return torch.ones_like(m)
    if name == "hard_sigmoid":
        return torch.where((m > -1) & (m < 1), 0.5, 0.0)
    if name == "leaky_relu":
        return torch.where(m > 0, 1.0, slope)
    return 1 / (1 + torch.exp(-m))


class EffectiveWeights(torch.autograd.Function):
    """T = W ⊙ h(M), whose backward pass gives dL/dT ⊙ h(M) for W, and the rule's gradient without μ for M."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, M: Tensor, rule: str, estimator: str, slope: float) -> Tensor:
        ctx.save_for_backward(W, M)
        ctx.rule, ctx.estimator, ctx.slope = rule, estimator, slope
        return torch.where(M > 0, W, torch.zeros_like(W))

    @staticmethod
    def backward(ctx: Any, dL_dT: Tensor) -> Any:  # type: ignore[override]
        W, M = ctx.saved_tensors
        direction = torch.sign(W) if ctx.rule == "autoprune" else W
        dL_dM = dL_dT * direction * h_prime(ctx.estimator, M, ctx.slope)
        return torch.where(M > 0, dL_dT, torch.zeros_like(dL_dT)), dL_dM, None, None, None


class Reference:
    """A network whose latent weights W any optimizer trains, and whose M an update rule trains."""

    def __init__(self, network: torch.nn.Module, rule: str, estimator: str, slope: float = 0.1) -> None:
        self.network, self.rule, self.estimator, self.slope = network, rule, estimator, slope
        self.W = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
        prunable = {name: w.detach() for name, w in self.W.items() if name.endswith("weight")}
        root_mean_square = torch.cat([w.flatten() for w in prunable.values()]).square().mean().sqrt()
        self.M = {name: (0.1 * w.abs() / root_mean_square).requires_grad_() for name, w in prunable.items()}
        self.mean_squares: list[float] = []
        self.g0_squares: dict[str, list[Tensor]] = {name: [] for name in self.M}  # every g₀² so far

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        effective = {
            name: EffectiveWeights.apply(w, self.M[name], self.rule, self.estimator, self.slope)
            if name in self.M
            else w
            for name, w in self.W.items()
        }
        return torch.nn.functional.cross_entropy(torch.func.functional_call(self.network, effective, (x,)), y)

    def weight_step(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        before = {name: w.detach().clone() for name, w in self.W.items()}
        optimizer.zero_grad()
        self.loss(x, y).backward(inputs=list(self.W.values()))
        with torch.no_grad():
            for name, m in self.M.items():  # the optimizer sees a pruned weight as 0, which weight decay leaves alone
                self.W[name][m <= 0] = 0
        optimizer.step()
        with torch.no_grad():
            for name, m in self.M.items():  # a pruned weight keeps its value, whatever the optimizer did
                self.W[name][m <= 0] = before[name][m <= 0]

    def auxiliary_step(self, x: Tensor, y: Tensor, lr: float, mu: float, decay: float = 0.999) -> None:
        gradients = dict(
            zip(self.M, torch.autograd.grad(self.loss(x, y), list(self.M.values())), strict=True),
        )
        # s² is the weighted average of the mean squares so far; each has `decay` times the weight of the next one.
        # h' is divided out again, since s is the scale of the sensitivity alone.
        total, count = 0.0, 0
        for name, g in gradients.items():
            slope = h_prime(self.estimator, self.M[name], self.slope).detach()
            total += float((g[slope > 0] / slope[slope > 0]).square().sum())
            count += g.numel()
        self.mean_squares.append(total / count)
        weights = [decay**age for age in reversed(range(len(self.mean_squares)))]
        s = math.sqrt(sum(w * q for w, q in zip(weights, self.mean_squares, strict=True)) / sum(weights))
        with torch.no_grad():
            for name, g in gradients.items():
                slope = h_prime(self.estimator, self.M[name], self.slope)
                if self.rule != "adaptive":
                    self.M[name] -= lr * (g / s + mu * slope)
                    continue
                g0 = torch.where(slope > 0, g / slope, 0.0) / s + mu
                self.g0_squares[name].append(g0**2)
                v = sum(w * q for w, q in zip(weights, self.g0_squares[name], strict=True)) / sum(weights)
                self.M[name] -= lr * slope * g0 / v.sqrt()
