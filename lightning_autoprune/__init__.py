"""Prune PyTorch Lightning models while they train, with one callback: a sparsity curve per layer, plain checkpoints."""

from lightning_autoprune._version import __version__ as __version__
from lightning_autoprune.deploy.onnx_export import export_onnx
from lightning_autoprune.deploy.shrink import shrink
from lightning_autoprune.deploy.sparse_file import load_sparse, load_sparse_into, save_sparse, sparse_metadata
from lightning_autoprune.deploy.torch_export import export_program
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.method.update_rules import UpdateRule
from lightning_autoprune.model.cost import LayerCost, ModelCost, model_cost
from lightning_autoprune.model.prunable_layers import prunable_weights
from lightning_autoprune.model.sparsity import Sparsity, layer_sparsity, sparsity
from lightning_autoprune.training.callback import AutoPruneCallback

__all__ = [
    "AutoPruneCallback",
    "AutoPruneError",
    "AuxiliaryParameters",
    "LayerCost",
    "ModelCost",
    "Pruner",
    "Settings",
    "Sparsity",
    "UpdateRule",
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
