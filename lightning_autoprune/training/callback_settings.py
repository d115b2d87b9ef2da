"""The settings of ``AutoPruneCallback``: those of the method, and those that concern a Lightning run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_autoprune.errors import check_flag, check_function, check_patterns
from lightning_autoprune.method.registry import describe
from lightning_autoprune.method.settings import Settings, in_range, setting
from lightning_autoprune.training.lightning_package import LightningModule

__all__ = ["CallbackSettings"]

_NOT_ABOUT_PRUNING = ("log_every_n_steps", "log_layers", "figures_every_n_epochs", "log_artifact", "enabled")


@dataclass(frozen=True)
class CallbackSettings(Settings):
    """All settings of ``AutoPruneCallback``, each with its type, default, allowed values and help.

    Raises:
        AutoPruneError: for a value that is not allowed; says what is.
    """

    held_out: float | Literal["val", "train"] | DataLoader | None = setting(  # type: ignore[type-arg]
        None,
        """the data that M is trained on and W is not (``train_gradients`` adds the data of W). A fraction in (0, 1):
        that fraction of the training data, see ``redraw_held_out``. ``"val"``: the validation loaders; masks are then
        fitted to what is reported. ``"train"``: nothing is held out, and M follows the gradients of the weight steps. A
        ``DataLoader``: its batches. None: 0.25 where samples can be held out, and ``"train"`` where they can't; a
        warning says why.""",
    )
    redraw_held_out: bool = setting(
        True,
        """True: a fraction is drawn anew from each batch, so that no data is lost and no more samples pass through the
        network than without pruning. False: it is one part of the training set for the whole run.""",
        check_flag,
    )
    train_gradients: bool | None = setting(
        None,
        """whether M follows the gradients of the weight steps too, as one mean over the samples of both (with a
        loader's batches: half and half). None: yes if a fraction of each batch is held out and one optimizer trains all
        prunable weights.""",
        lambda name, value: check_flag(name, value, also=", or None"),
    )
    include: list[str] | None = setting(
        None,
        """patterns (``fnmatch``) of the layers or parameters to prune. None: all linear, bilinear, convolution,
        recurrent, attention and expert layers. Embeddings and other parameters with two or more dimensions are pruned
        only if a pattern matches them.""",
        lambda name, value: check_patterns(
            name, value, empty="so nothing would be pruned: leave it out, or switch pruning off with `enabled=False`."
        ),
    )
    exclude: list[str] | None = setting(None, "patterns of the layers or parameters to leave dense.", check_patterns)
    loss_fn: Callable[[LightningModule, Any], Tensor] | None = setting(
        None,
        """takes the module and a held-out batch and returns the loss. None: ``training_step`` is called, shielded so
        that it leaves the run untouched. Required for holding data out with manual optimization.""",
        lambda name, value: check_function(name, value, "the module and a held-out batch"),
    )
    log_every_n_steps: int | None = setting(
        None, """interval of the logs in training steps, >= 1. None: the Trainer's.""", in_range(1, whole=True)
    )
    log_layers: bool = setting(
        True,
        """whether loggers get the sparsity of every layer, as ``autoprune/layer_sparsity/<layer>``, beside that of all
        layers together. Figures and ``callback.curves`` always have the layers.""",
        check_flag,
    )
    figures_every_n_epochs: int | None = setting(
        0,
        """when loggers get figures beside the curves, as
        :func:`~lightning_autoprune.training.loggers.figures.log_figures` says. 0: when fitting ends; n: also at the end
        of every n-th epoch; None: never.""",
        lambda name, value: None if value is None else in_range(0, whole=True)(name, value),
    )
    log_artifact: bool = setting(
        False,
        """whether a ``WandbLogger`` gets the best pruned checkpoint when fitting ends, as an artifact of type ``model``
        with the alias ``pruned``. Sparsity, operations and the monitored metric are its metadata.""",
        check_flag,
    )
    seed: int = setting(
        0,
        """seed of the draw of held-out samples, and of the random numbers in the held-out pass: an integer in [0,
        4294967295], as for ``seed_everything``.""",
        in_range(0, 2**32 - 1, whole=True),
    )
    enabled: bool = setting(
        True, """False switches the callback off: training is the same as without it, bit for bit.""", check_flag
    )

    def hyperparameters(self) -> dict[str, Any]:
        """Return the settings that say how a run is pruned, by name, as plain data."""
        values = {e.name: getattr(self, e.name) for e in fields(self) if e.name not in _NOT_ABOUT_PRUNING}
        return {
            name: list(map(str, value)) if isinstance(value, (list, tuple)) else describe(value)
            for name, value in values.items()
        }
