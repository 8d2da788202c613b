"""Remove, replace and add experts of a finished MoE."""
