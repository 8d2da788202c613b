from itertools import pairwise

from benchmarks.study.compare.figures import label_ends
from moedisco_ray.cli.figures import blank_figure


def test_names_of_curves_that_end_at_one_height_do_not_overlap():
    axes = blank_figure(6, 4).subplots()
    axes.plot([0, 1], [8.0, 4.0])
    label_ends(axes, [(1.0, 4.0, f"arm {number}", "black") for number in range(5)])
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert len(heights) == 5
    assert all(right - left >= 0.06 - 1e-9 for left, right in pairwise(heights))
