"""The demo: data and networks to try the callback on. ``lightning-autoprune demo`` runs it."""
