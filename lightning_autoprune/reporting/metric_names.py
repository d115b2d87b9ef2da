"""Names for loggers that file each metric at a path: no name is the folder of another one."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["LAYER_SPARSITY", "SPARSITY", "loggable_names"]

SPARSITY, LAYER_SPARSITY = "autoprune/sparsity", "autoprune/layer_sparsity"

_MAX_LENGTH = 200  # MLflow allows 250 characters, of which the folders and a logger's prefix take some


def loggable_names(layers: Iterable[str]) -> dict[str, str]:
    """Return a name for each layer that is a valid last part of a metric's name in every logger.

    Most layers keep their own name. Characters other than ASCII letters, digits, ``_``, ``.`` and ``-`` become ``_``,
    since a slash would make a folder and MLflow, among others, drops the rest. Of a long name, the last 200 characters
    are kept. Where two layers would get the same name, a number is appended to that of the later one.

    Args:
        layers: all layers of the run, in order.

    Returns:
        Names by layer, each different.

    Example:
        >>> loggable_names(["net.0", "heads.a/b", "heads.a_b"])
        {'net.0': 'net.0', 'heads.a/b': 'heads.a_b_2', 'heads.a_b': 'heads.a_b'}
    """
    layers = list(layers)
    candidates = {layer: re.sub(r"[^A-Za-z0-9_.-]", "_", layer)[-_MAX_LENGTH:] for layer in layers}
    names = {layer: layer for layer in layers if candidates[layer] == layer}
    taken = set(names.values())
    for layer in layers:
        if layer not in names:
            name, number = candidates[layer], 1
            while name in taken:
                number += 1
                name = f"{candidates[layer]}_{number}"
            names[layer] = name
            taken.add(name)
    return {layer: names[layer] for layer in layers}
