"""Merge sub-models into one Mixture-of-Experts: join the tensors one by one, then calibrate the routers on data."""
