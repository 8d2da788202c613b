"""Make one MoE of dense fine-tunes of one base model."""
