"""The stages that train: the seed model, the sub-models, and the fine-tune of the whole MoE."""
