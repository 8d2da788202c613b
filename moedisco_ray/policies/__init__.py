"""Decisions about machines that come and go, as pure functions of what is known: no Ray, no torch, no clock.

| module | decides |
| --- | --- |
| `ordering` | which sub-model starts next |
| `placement` | on which node type of a mixed pool |
| `checkpointing` | how often to save |
| `retrying` | what follows when workers end before their time |
| `rounds` | when backbones meet, and which of them a round combines |
| `quorum` | when the merge may start without some sub-models |
| `arrival` | when to ask for the expensive nodes |
| `gang` | how many workers the fine-tune has |

The runtime calls them with what it measures, and `benchmarks/simulator.py` with what it simulates.
"""
