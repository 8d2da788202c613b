from itertools import pairwise

import matplotlib.image
import pytest
from run_example import report, run_report

from moedisco_ray.cli.figures import draw_clusters, draw_experts, draw_loss, plot
from moedisco_ray.core.records import ClusterMap, RouterRecord
from moedisco_ray.core.run_record import RunReport


def test_every_figure_is_a_picture_with_something_in_it(tmp_path):
    files = plot(run_report(), tmp_path / "figures")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "figures/loss.png", "figures/clusters.png", "figures/experts.png"]
    for file in files:
        height, width, _ = matplotlib.image.imread(file).shape
        assert min(height, width) > 300
        assert matplotlib.image.imread(file)[..., :3].std() > 0.05


def test_a_run_without_figures_to_draw(tmp_path):
    assert plot(RunReport.model_validate(report() | {"curves": {}, "clusters": {}, "evaluation": {}}), tmp_path / "figures") == []
    assert list(tmp_path.iterdir()) == []


def test_loss_names_every_unit_and_no_two_names_overlap():
    curves = run_report().curves
    for curve in curves.values():
        curve.loss[-1] = 4.0  # all end at the same height
    figure = draw_loss(curves)
    units, tuned = figure.axes
    names = {text.get_text().split()[0] for axes in figure.axes for text in axes.texts}
    assert names == set(curves)
    assert len(units.lines) == 5
    assert len(tuned.lines) == 1
    heights = sorted(text.get_position()[1] for text in units.texts)
    assert all(right - left >= 0.06 - 1e-9 for left, right in pairwise(heights))
    assert len({line.get_color() for line in units.lines}) == 5


def test_a_fine_tune_alone_has_one_panel():
    assert len(draw_loss({"finetune": run_report().curves["finetune"]}).axes) == 1


def test_clusters_have_a_second_panel_where_there_are_sources():
    points = run_report().clusters.map
    both = draw_clusters(points)
    assert [axes.get_title(loc="left") for axes in both.axes] == ["Clusters", "Sources"]
    assert sum(len(dots.get_offsets()) for dots in both.axes[0].collections) == 900
    alone = draw_clusters(points.model_copy(update={"source": ["docs"] * 900}))
    assert len(alone.axes) == 1


def test_cluster_names_are_in_order_of_number():
    many = ClusterMap(x=list(range(12)), y=list(range(12)), cluster=list(range(12))[::-1], source=[""] * 12)
    labels = [text.get_text().split("  ")[0] for text in draw_clusters(many).axes[0].get_legend().get_texts()]
    assert labels == [f"cluster {k}" for k in range(12)]


@pytest.mark.parametrize("experts", [1, 4, 60])
def test_experts_are_drawn_as_layers_by_experts(experts):
    figure = draw_experts([RouterRecord(layer=layer, load=[1 / experts] * experts) for layer in range(3)])
    assert figure.axes[0].images[0].get_array().shape == (3, experts)
    assert len(figure.axes[0].texts) == (3 * experts if experts <= 16 else 0)
    figure.canvas.draw()
