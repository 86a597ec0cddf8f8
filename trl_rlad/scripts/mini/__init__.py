"""The models of the task in miniature, and the scripts that made them."""
