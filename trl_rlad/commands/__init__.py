"""The sub-commands of `trl-rlad`."""
