# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How it works, on one linear layer
#
# We prune a layer with 8×16 weights, small enough to draw, in a plain torch loop. The method is AutoPrune (Xiao, Wang,
# Rajasekaran, NeurIPS 2019). We use the symbols of the paper:
#
# | symbol | meaning |
# |---|---|
# | W | latent weights, trained by an optimizer on training data |
# | M | auxiliary parameters, one m per weight, trained on data held out from W |
# | h(M) | the mask: h(m) = 1 where m > 0, else 0 |
# | T = W ⊙ h(M) | the weights that the layer computes with, stored in `layer.weight` |

# %%
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn.functional import linear, mse_loss

from lightning_autoprune import AuxiliaryParameters, Pruner, Settings
from lightning_autoprune.method.estimators import ESTIMATORS, straight_through
from lightning_autoprune.method.schedule import target_path
from lightning_autoprune.method.update_rules import make_rule
from lightning_autoprune.plots import COLORS

torch.set_num_threads(1)
BLUE, ORANGE, GREEN, _, _, RED, _ = COLORS
SHAPE = OUTPUTS, INPUTS = 8, 16
random = torch.Generator()


def make_batch(A, samples=32):
    """Return new inputs x from N(0, I) and noisy targets A·x. No sample is ever in two batches."""
    x = torch.randn(samples, A.shape[1], generator=random)
    return x, x @ A.T + torch.randn(samples, A.shape[0], generator=random)


def compute_gradient(T, A):
    """Return dL/dT on a new batch, including the entries of pruned weights."""
    x, y = make_batch(A)
    return torch.autograd.grad(mse_loss(linear(x, T), y), T)[0]


def make_layer(W):
    """Return a linear layer with the weights W."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data.copy_(W)
    return layer


def make_panels(*labels, width=4.2, height=3.2, rows=1):
    """Return a figure and its axes, one per (title, x label, y label)."""
    columns = len(labels) // rows
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (title, x, y) in zip(axes, labels, strict=True):
        ax.set(xlabel=x, ylabel=y)
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def show(figure):
    """Return the figure as a picture with 128 colors, which keeps the notebook small."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128)


# %% [markdown]
# ## W, M, h(M) and T
#
# The targets come from a matrix A, three quarters of whose entries are zeros. The layer is trained dense for 300 steps.
# Then `AuxiliaryParameters` adds an m to each weight, and each training step has two parts:
#
# * Weight step: dL/dW = dL/dT ⊙ h(M). A pruned weight gets no gradient and keeps its value.
# * Auxiliary step, on another batch: m ← m − η · h'(m) · (dL/dT · sgn(w) / s + μ). The pressure μ prunes. Dividing by
#   s, the running root mean square of dL/dT · sgn(w) over all weights, makes the effect of μ independent of the scale
#   of the loss.

# %%
random.manual_seed(0)
A = torch.randn(SHAPE, generator=random)
A *= torch.rand(SHAPE, generator=random) < 0.25

layer = make_layer(0.1 * torch.randn(SHAPE, generator=random))
optimizer = torch.optim.Adam(layer.parameters(), 0.01)
aux = None
for step in range(600):
    if step == 300:
        aux = AuxiliaryParameters({"layer": layer.weight}, update_rule="autoprune")
    x, y = make_batch(A)
    optimizer.zero_grad()
    mse_loss(layer(x), y).backward()
    if aux:
        aux.mask_gradients()
    optimizer.step()
    if aux:
        aux.after_weight_step()
        aux.step([compute_gradient(layer.weight, A)], lr=0.05, mu=0.2)
        aux.update_masks()

(W,), (M,), (mask,) = aux.W, aux.M, aux.masks()
assert torch.equal(layer.weight.data, torch.where(mask, W, 0.0))
print(f"{int((~mask).sum())} of {A.numel()} weights are pruned; A has {int((A == 0).sum())} zeros")
print(f"the mask keeps {int((mask & (A != 0)).sum())} of the {int((A != 0).sum())} nonzero entries of A")

# %%
figure = Figure(figsize=(11, 2.3), layout="constrained")
matrices = {"A (of the data)": A, "W": W, "M": M, "h(M)": mask.float(), "T = W ⊙ h(M)": layer.weight.data}
for ax, (title, values) in zip(figure.subplots(1, 5), matrices.items(), strict=True):
    binary, limit = title == "h(M)", float(values.abs().max())
    image = ax.imshow(values, cmap="gray_r" if binary else "PuOr", vmin=0 if binary else -limit, vmax=limit)
    ax.set(title=title, xlabel="input", xticks=[0, INPUTS - 1], yticks=[0, OUTPUTS - 1])
    figure.colorbar(image, ax=ax, orientation="horizontal", shrink=0.9, ticks=[0, 1] if binary else None)
figure.axes[0].set_ylabel("output")
show(figure)

# %% [markdown]
# ## The hard step and its straight-through estimators
#
# The derivative of h is 0 everywhere except at the step, where there is none. No gradient would ever reach M. In the
# auxiliary step, a straight-through estimator h'(m) replaces the derivative; the mask itself stays hard. Where
# h'(m) = 0, as for `hard_sigmoid` at m ≤ −1, m no longer moves, and the weight can't come back.

# %%
m = torch.linspace(-2, 2, 801)
figure, (left, right) = make_panels(("the mask h(m)", "m", "h(m)"), ("straight-through estimators", "m", "h'(m)"))
for side in (m[m <= 0], m[m > 0]):
    left.plot(side, (side > 0).float(), color="black", lw=2)
left.plot(0, 0, "o", color="black")
left.plot(0, 1, "o", color="black", mfc="white")
for name, color, dashes in zip(ESTIMATORS, (BLUE, ORANGE, GREEN, RED), ("-", "--", "-.", ":"), strict=True):
    slope = straight_through(name, m)
    right.plot(m, torch.ones_like(m) if slope is None else slope, dashes, color=color, lw=2, label=name)
right.set_ylim(-0.05, 1.45)
right.legend(frameon=False, ncols=2, fontsize=8)
show(figure)

# %% [markdown]
# ## The three consistencies
#
# The term of the auxiliary step that comes from the loss is the coarse gradient dL/dm. The paper requires three
# properties of it. We measure them for four rules, without h'(m) and s. The first three are the values of the package's
# `update_rule`.
#
# | rule | coarse gradient dL/dm | |
# |---|---|---|
# | `vanilla` | dL/dT · w | the plain chain rule |
# | `autoprune` | dL/dT · sgn(w) | the paper's rule |
# | `adaptive` | dL/dT · w / √v | the default; v is each weight's running mean square of dL/dT · w / s + μ |
# | without w | dL/dT | wrong, for comparison |
#
# In this section W is fixed and only M moves.

# %%
LOOKS = {"vanilla": (ORANGE, "o"), "autoprune": (BLUE, "s"), "adaptive": (GREEN, "^"), "without w": (RED, "x")}


def make_auxiliary(rule, W):
    """Return auxiliary parameters for a layer with the weights W; each m is 0.1."""
    rule = "autoprune" if rule == "without w" else rule
    return AuxiliaryParameters({"layer": make_layer(W).weight}, update_rule=rule, initial_m="constant")


def take_auxiliary_steps(aux, rule, A, steps, mu=0.0, update_masks=True):
    """Take auxiliary steps with η = 0.01, each on a new batch; return M before the first step and after each step."""
    path = [aux.M[0].clone()]
    for _ in range(steps):
        dL_dT = compute_gradient(aux.weights["layer"], A)
        if rule == "without w":
            dL_dT *= aux.W[0].sign()  # the paper's rule multiplies by sgn(w) again, and sgn(w)² = 1
        aux.step([dL_dT], 0.01, mu)
        if update_masks:
            aux.update_masks()
        path.append(aux.M[0].clone())
    return torch.stack(path)


# %% [markdown]
# ### 1. Sensitivity: the step of m must not scale with |w|
#
# The layer is at its optimum, W = A, with magnitudes from 0.03 to 3, and there is no pressure. The gradient is then
# pure noise, of the same size for each weight. Left: the root mean square of the steps of m. The plain chain rule
# multiplies the noise by |w|; the paper's rule and the default do not. Right: the effect once masks are updated. Now
# and then noise prunes a weight: with the plain chain rule only large weights, with the other two rules mostly small
# ones.

# %%
random.manual_seed(1)
by_magnitude = torch.randperm(OUTPUTS * INPUTS, generator=random)
magnitude = torch.empty(OUTPUTS * INPUTS)
magnitude[by_magnitude] = torch.logspace(-1.5, 0.5, OUTPUTS * INPUTS)
A = magnitude.view(SHAPE) * torch.randn(SHAPE, generator=random).sign()

figure, (left, right) = make_panels(
    ("size of the steps of m", "|w|", "root mean square of dm / η"),
    ("with updated masks", "|w|", "share of steps pruned (%)"),
)
spread = {}
for rule, (color, marker) in LOOKS.items():
    path = take_auxiliary_steps(make_auxiliary(rule, A), rule, A, 200, update_masks=False)
    size = (path.diff(dim=0) / 0.01).square().mean(0).sqrt().flatten()
    spread[rule] = float(size.max() / size.min())
    if rule == "without w":
        continue
    left.loglog(magnitude, size, marker, color=color, ms=4, label=rule)
    pruned = (take_auxiliary_steps(make_auxiliary(rule, A), rule, A, 600) <= 0).float().mean(0).flatten()
    groups = by_magnitude.view(8, 16)  # 16 weights of similar magnitude in each
    right.semilogx(magnitude[groups].mean(1), 100 * pruned[groups].mean(1), f"{marker}-", color=color, label=rule)
right.set_yscale("symlog", linthresh=0.1)
right.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
left.legend(frameon=False)
right.legend(frameon=False)
show(figure)

# %% [markdown]
# ### 2. Correlation: m must move in the direction in which |w| moves
#
# That is, sgn(dL/dm) = sgn(dL/d|w|), where dL/d|w| = dL/dT · sgn(w). All three rules of the package have this sign,
# including the plain chain rule. Leaving out w breaks it: m then follows w instead of |w|. Left: the change of |w| in
# one step of gradient descent, and of m in one auxiliary step on the same batch. Right: at W = A, all weights except
# one are pruned, and only the gradient decides which of them come back. With the paper's rule, weights of both signs
# do; without w, most negative weights do not.

# %%
random.manual_seed(2)
W = torch.randn(SHAPE, generator=random)
A = W + 0.3 * torch.randn(SHAPE, generator=random)
figure, (left, right) = make_panels(
    ("one batch, in units of the largest change", "change of |w|", "change of m"),
    ("after pruning all weights except one", "auxiliary step", "weights kept (%)"),
)
agreement = {}
for rule, (color, marker) in LOOKS.items():
    aux = make_auxiliary(rule, W)
    take_auxiliary_steps(aux, rule, A, 50, update_masks=False)  # the default needs some steps to estimate v
    random.manual_seed(3)
    change = take_auxiliary_steps(aux, rule, A, 1, update_masks=False).diff(dim=0)[0]
    random.manual_seed(3)
    growth = (W - 0.001 * compute_gradient(make_layer(W).weight, A)).abs() - W.abs()
    agreement[rule] = float((change.sign() == growth.sign()).float().mean())
    scaled = [(value / value.abs().max()).flatten() for value in (growth, change)]
    left.plot(*scaled, marker, color=color, ms=4, label=rule)
left.axhline(0, color="black", lw=0.8)
left.axvline(0, color="black", lw=0.8)
left.set_xticks([-1, -0.5, 0, 0.5, 1])
figure.legend(loc="outside lower left", frameon=False, fontsize=8, ncols=4)
for rule in ("autoprune", "without w"):
    aux = make_auxiliary(rule, W)
    aux.keep(1)
    kept = take_auxiliary_steps(aux, rule, W, 60) > 0
    for sign, places, dashes in (("positive", W > 0, "-"), ("negative", W < 0, "--")):
        share = kept[:, places].float().mean(1)
        right.plot(100 * share, dashes, color=LOOKS[rule][0], lw=2, label=f"{rule}, w {sign}")
right.legend(frameon=False, fontsize=8)
show(figure)

# %% [markdown]
# ### 3. Direction: the coarse gradient must be a descent direction of the true objective
#
# That is, the inner product of the expected coarse gradient and the true gradient is positive. We add noise ε from
# N(0, 1) to M, so that the objective is smooth and its gradient is known. Let inputs be from N(0, I) and
# T = W ⊙ h(M + ε), and let φ and Φ be the density and the distribution function of N(0, 1). Up to a constant:
#
# L(M) = E ½‖(T − A)x‖² = Σ ½ (Φ(m)(w − a)² + (1 − Φ(m)) a²), and therefore dL/dm = φ(m) · ½ ((w − a)² − a²).
#
# W and A are random, so pruning many of the weights lowers the loss. Left: both gradients, each divided by its largest
# entry. Right: the true objective while M follows the coarse gradients of single batches, in steps of equal length.

# %%
random.manual_seed(4)
W, A = torch.randn(2, *SHAPE, generator=random)
M = 0.3 * torch.randn(SHAPE, generator=random)
normal = torch.distributions.Normal(0.0, 1.0)


def compute_true_objective(M):
    kept = normal.cdf(M)
    return float((kept * (W - A) ** 2 + (1 - kept) * A**2).sum() / 2)


def sample_coarse_gradient(rule, M, estimator, state):
    """Return the coarse gradient for one sample of the noise and one batch; `state` is [v, number of updates]."""
    noisy = M + torch.randn(SHAPE, generator=random)
    x, y = make_batch(A)
    dL_dT = (x @ torch.where(noisy > 0, W, 0.0).T - y).T @ x / len(x)
    G = dL_dT
    if rule != "without w":
        state[1] += 1
        G = make_rule(rule).sensitivity(dL_dT, W)
        G = make_rule(rule).direction(G, {"v": state[0]}, updates=state[1], decay=0.999)
    slope = straight_through(estimator, noisy)
    return G if slope is None else G * slope


true = normal.log_prob(M).exp() * ((W - A) ** 2 - A**2) / 2
figure, (left, right) = make_panels(
    ("expected coarse gradient, h' = 1", "true gradient", "coarse gradient"),
    ("M follows the coarse gradient", "step", "true objective"),
)
cosines = {}
for rule, (color, marker) in LOOKS.items():
    for estimator in ESTIMATORS:
        state = [torch.zeros_like(M), 0]
        coarse = sum(sample_coarse_gradient(rule, M, estimator, state) for _ in range(150)) / 150
        cosines[rule, estimator] = float((coarse * true).sum() / (coarse.norm() * true.norm()))
        if estimator == "linear":
            scaled = [(value / value.abs().max()).flatten() for value in (true, coarse)]
            left.plot(*scaled, marker, color=color, ms=3.5, label=rule)
    m, state, objective = M, [torch.zeros_like(M), 0], [compute_true_objective(M)]
    for _ in range(200):
        G = sample_coarse_gradient(rule, m, "linear", state)
        m = m - 0.2 * G / G.norm()
        objective.append(compute_true_objective(m))
    right.plot(objective, color=color, lw=2, ls="--" if rule == "without w" else "-")
left.axhline(0, color="black", lw=0.8)
left.axvline(0, color="black", lw=0.8)
figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=4)
show(figure)

# %% [markdown]
# All three in numbers. The cosine is the one between the expected coarse gradient and the true gradient, for each h'.
# The plain chain rule violates only the first consistency. The rule without w violates the other two: m moves with |w|
# in about half of the cases, and the cosine is near 0.

# %%
print(f"{'':>9}  largest / smallest step  m moves as |w|  cosine:", *(f"{name:>12}" for name in ESTIMATORS))
for rule in LOOKS:
    numbers = " ".join(f"{cosines[rule, estimator]:12.2f}" for estimator in ESTIMATORS)
    print(f"{rule:>9}  {spread[rule]:23.1f}  {agreement[rule]:14.0%}  {'':7} {numbers}")
consistent = ("autoprune", "adaptive")
assert all(spread[rule] < 2 < 50 < spread["vanilla"] for rule in consistent)
assert all(agreement[rule] == 1 for rule in consistent)
assert all(cosines[rule, estimator] > 0.3 for rule in consistent for estimator in ESTIMATORS)

# %% [markdown]
# ### What the default adds
#
# `adaptive` divides the plain chain rule and the pressure by √v, so all its steps are of equal size, as with the
# paper's rule. The difference is the pressure, which becomes μ / √v. Again the layer is at its optimum, with magnitudes
# from 0.03 to 3, but now with the pressure μ = 0.5 and without masks. With the paper's rule all m fall about equally
# fast. With the default, an m falls more slowly if |w| is large, that is, if the loss is sensitive to the weight.

# %%
random.manual_seed(5)
A = magnitude.view(SHAPE)
figure, (ax,) = make_panels(("how fast the pressure prunes", "|w|", "mean fall of m per step / η"), width=5.5)
for rule in ("autoprune", "adaptive"):
    aux = make_auxiliary(rule, A)
    path = take_auxiliary_steps(aux, rule, A, 500, mu=0.5, update_masks=False)
    fall = (path[0] - path[-1]).flatten() / 0.01 / 500
    ax.semilogx(magnitude, fall, LOOKS[rule][1], color=LOOKS[rule][0], ms=4, label=rule)
v = aux.averages["v"][0].flatten() / (1 - aux.scale.decay ** aux.updates[0])
ax.semilogx(magnitude[by_magnitude], 0.5 / v[by_magnitude].sqrt(), color="black", lw=1, label="μ / √v")
ax.set_ylim(0, 1.25)
ax.legend(frameon=False, ncols=3, loc="upper right")
show(figure)

# %% [markdown]
# ## A weight that is pruned and comes back
#
# From here on `Pruner` runs the whole schedule with its defaults: first dense, then pruning to a sparsity of 60%, then
# fine-tuning with final masks. In the middle of the pruning phase the task changes: 16 entries of A that were 0 become
# 1 or −1.


# %%
def train(settings, steps, task):
    """Train and prune a layer in a plain torch loop; return the pruner, and its state after each step."""
    random.manual_seed(6)
    layer = make_layer(0.1 * torch.randn(task(0).shape, generator=random))
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    pruner = Pruner({"layer": layer.weight}, settings, steps)
    pruner.start()
    seen = {"sparsity": [], "mu": [], "W": [], "M": [], "mask": []}
    for step in range(steps):
        x, y = make_batch(task(step))
        optimizer.zero_grad()
        mse_loss(layer(x), y).backward()
        pruner.before_weight_step()
        optimizer.step()
        pruner.after_weight_step()
        if pruner.due:
            pruner.auxiliary_step([compute_gradient(layer.weight, task(step))])
        pruner.end_step()
        W = T = layer.weight.data.clone()
        M, mask = torch.full_like(T, torch.nan), torch.ones_like(T, dtype=torch.bool)
        if pruner.auxiliary:
            (mask,) = pruner.masks()
            if not pruner.masks_final:
                W, M = pruner.auxiliary.W[0], pruner.auxiliary.M[0].clone()
        assert torch.equal(T, torch.where(mask, W, 0.0))  # T = W ⊙ h(M)
        for name, value in zip(seen, (pruner.sparsity, pruner.mu, W, M, mask), strict=True):
            seen[name].append(value)
    return pruner, seen


random.manual_seed(0)
before = torch.randn(SHAPE, generator=random)
before *= torch.rand(SHAPE, generator=random) < 0.25
zeros = (before == 0).flatten().nonzero().flatten()
new = zeros[torch.randperm(len(zeros), generator=random)[:16]]
after = before.clone()
after.view(-1)[new] = torch.randn(16, generator=random).sign()

CHANGE = 600
pruner, seen = train(Settings(target_sparsity=0.6), 1200, lambda step: before if step < CHANGE else after)
W, M, mask = (torch.stack(seen[name]).flatten(1) for name in ("W", "M", "mask"))
revivals = (mask[1:] & ~mask[:-1]).sum(0)
print(pruner.phases)
print(f"{int((revivals > 0).sum())} of {len(revivals)} weights were pruned and came back at least once")

# %% [markdown]
# The task now needs 16 more weights. Of those that are kept at the end, we draw the one that had been pruned longest.

# %%
pruned_at = {i: int(mask[:CHANGE, i].nonzero().max()) + 1 for i in new.tolist() if mask[-1, i]}
i = min(pruned_at, key=pruned_at.get)
back_at = CHANGE + int(mask[CHANGE:, i].nonzero().min())

figure, axes = make_panels(
    (f"the weight from input {i % INPUTS} to output {i // INPUTS}", "", "w"),
    ("", "", "w, enlarged"),
    ("", "", "m"),
    ("", "training step", "h(m)"),
    rows=4,
    width=8,
    height=1.6,
)
for ax in axes[:2]:
    ax.plot(W[:, i], color=BLUE, lw=2, label="w, latent")
    ax.plot(torch.where(mask[:, i], W[:, i], 0.0), "--", color=ORANGE, label="T = w · h(m)")
largest = 3 * abs(float(W[CHANGE, i]))
axes[1].set_ylim(-largest, largest)
axes[2].plot(M[:, i], color=GREEN)
axes[2].axhline(0, color="black", lw=0.8)
axes[3].plot(mask[:, i].float(), color="black", drawstyle="steps-post")
axes[3].set_yticks([0, 1])
for ax in axes:
    ax.axvline(CHANGE, color=RED, ls=":", label="the task changes")
    ax.axvspan(pruner.phases.start, pruner.phases.end, color="0.93", zorder=-1, label="pruning phase")
    ax.set_xlim(0, pruner.phases.total)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8, ncols=4)
show(figure)

# %% [markdown]
# While a weight is pruned, its dormant value does not change by a single bit. This value decides whether the weight
# comes back: m rises where a larger |w| lowers the loss. Of the 16 weights, those came back whose dormant value had the
# required sign.

# %%
phase = slice(pruner.phases.start, pruner.phases.end - 1)  # when it ends, dormant values are discarded
dormant = ~mask[phase][1:] & ~mask[phase][:-1]
assert torch.equal(W[phase][1:][dormant], W[phase][:-1][dormant])
print(f"pruned after step {pruned_at[i]} with w = {W[pruned_at[i], i]:.6f}")
print(f"kept again after step {back_at}; until then w = {W[back_at - 1, i]:.6f}")
required_sign = W[CHANGE, new].sign() == after.view(-1)[new]
for name, group in (("the required sign", new[required_sign]), ("the other sign", new[~required_sign])):
    print(f"dormant value with {name}: {int(mask[-1, group].sum())} of {len(group)} are kept at the end")

# %% [markdown]
# ## Pressure and target
#
# In this section the layer has 32×64 weights of very different magnitudes, so one weight makes little difference.
# Without a target, μ is constant, and the sparsity settles where the pressure and the loss balance. With a target, a
# controller adjusts μ so that the density follows a path to the target. At each step, ln μ changes by a term for
# e = ln(density / path) and a term for the change of e. At first, gradient noise prunes more than the path asks for.
# The target is met exactly when the masks become final.

# %%
random.manual_seed(0)
A, spread_out = torch.randn(2, 32, 64, generator=random)
A *= 0.5 * spread_out.exp()
figure, axes = make_panels(
    ("constant pressure", "training step", "sparsity (%)"),
    ("target 90%", "training step", "sparsity (%)"),
    ("the pressure with a target", "training step", "μ"),
    width=3.7,
)
for mu, color, dashes in ((0.01, BLUE, "-"), (0.1, ORANGE, "--"), (1.0, GREEN, "-.")):
    _, seen = train(Settings(pressure=mu), 400, lambda step: A)
    axes[0].plot([100 * s for s in seen["sparsity"]], dashes, color=color, lw=2, label=f"μ = {mu:g}")
pruner, seen = train(Settings(target_sparsity=0.9), 1000, lambda step: A)
path = [100 * (1 - target_path(pruner.phases.progress(step + 1), 1.0, 0.1)) for step in range(1000)]
axes[1].plot([100 * s for s in seen["sparsity"]], color=BLUE, lw=2, label="sparsity")
axes[1].plot(path, "--", color="black", lw=1.5, label="target path")
axes[2].semilogy(seen["mu"], color=GREEN, lw=1)
for ax in axes[:2]:
    ax.set_ylim(-2, 102)
    ax.legend(frameon=False, loc="lower right")
show(figure)

# %%
assert int(pruner.masks()[0].sum()) == round(0.1 * A.numel())
print("T = W ⊙ h(M) after each step, dormant values unchanged, target met")
