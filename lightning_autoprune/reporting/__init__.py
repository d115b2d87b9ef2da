"""Reports on a pruned model: its tables, pictures and pages, and the checkpoint reader and run history behind them."""
