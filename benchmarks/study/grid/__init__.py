"""The grid: arms over activation, budget, corpus, family and start, measured piece by piece and reported as gaps and dollars."""
