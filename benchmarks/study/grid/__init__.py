"""The grid: arms over activation, budget, corpus, family and start, measured in pieces, with gaps and dollars."""
