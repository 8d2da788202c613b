from __future__ import annotations

from moedisco_ray.on_ray.free_slots import unused

GROUP = "8f3b" * 9


def test_what_a_group_keeps_for_a_worker_to_come_is_unused() -> None:
    nodes = [
        {"CPU": 2.0, "high_mem_gpu": 1.0, "other_gpu": 5.0},
        # Two bundles of a group, one of which a worker holds: Ray tells of the bundles one by one, and of their sum.
        {f"high_mem_gpu_group_{GROUP}": 1.0, f"high_mem_gpu_group_1_{GROUP}": 1.0, f"bundle_group_{GROUP}": 1000.0},
        {"high_mem_gpu.large": 3.0, f"other_gpu_group_{GROUP}": 2.0},
    ]
    assert unused(nodes, "high_mem_gpu") == 2
    assert unused(nodes, "other_gpu") == 7
    assert unused([], "high_mem_gpu") == 0
