"""What `trl-rlad train`, `distil` and `evaluate` run, with their tasks and settings."""
