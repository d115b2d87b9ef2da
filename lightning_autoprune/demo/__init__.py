"""The demo: data and networks to try the callback on. ``python -m lightning_autoprune.demo`` runs it."""
