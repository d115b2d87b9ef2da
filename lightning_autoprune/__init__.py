"""Prune a PyTorch Lightning model while it trains: one callback, every layer's curve, plain checkpoints."""

from lightning_autoprune.auxiliary import AuxiliaryParameters
from lightning_autoprune.callback import AutoPruneCallback
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.flops import LayerCost, ModelCost, model_cost
from lightning_autoprune.layers import prunable_weights
from lightning_autoprune.onnx import export_onnx
from lightning_autoprune.program import export_program
from lightning_autoprune.pruner import Pruner, Settings
from lightning_autoprune.shrink import shrink
from lightning_autoprune.sparse_file import load_sparse, load_sparse_into, save_sparse, sparse_metadata
from lightning_autoprune.sparsity import Sparsity, layer_sparsity, sparsity

__version__ = "0.1.0"

__all__ = [
    "AutoPruneCallback",
    "AutoPruneError",
    "AuxiliaryParameters",
    "LayerCost",
    "ModelCost",
    "Pruner",
    "Settings",
    "Sparsity",
    "export_onnx",
    "export_program",
    "layer_sparsity",
    "load_sparse",
    "load_sparse_into",
    "model_cost",
    "prunable_weights",
    "save_sparse",
    "shrink",
    "sparse_metadata",
    "sparsity",
]
