"""The control service: training requests over REST, each run as a Ray Job. Imports no torch."""
