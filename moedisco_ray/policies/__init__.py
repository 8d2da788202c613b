"""Decisions about machines that come and go, as pure functions: no Ray, no torch, no clock.

| module | decides |
| --- | --- |
| `ordering` | which sub-model starts next |
| `placement` | on which node type of a mixed pool |
| `checkpointing` | how often to save |
| `retrying` | what to do when workers end too early |
| `sync_points` | after which steps sub-models synchronise, which of them a sync combines, and in which ranges |
| `quorum` | when the merge may start without some sub-models |
| `arrival` | when to ask for the expensive nodes |
| `gang` | how many workers the fine-tune uses |
| `leasing` | which seats stay while no driver works on the run |
| `setting_aside` | when work leaves out a card on which trainings fail |

The runtime calls these functions with its measurements. The simulator in `benchmarks/study` calls them with simulated
measurements.
"""
