"""Sub-models into one Mixture-of-Experts: tensors joined one by one, then routers calibrated on data."""
