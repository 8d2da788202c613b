import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_example import report, run_report

from moedisco_ray.cli.figures import draw_clusters, draw_experts, draw_loss, plot, running_mean
from moedisco_ray.core.records.run_record import Curve, RunReport
from moedisco_ray.core.records.summaries import ClusterMap, RouterRecord


def test_every_figure_is_a_picture_that_is_not_blank(tmp_path):
    files = plot(run_report(), tmp_path / "figures")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "figures/loss.png",
        "figures/clusters.png",
        "figures/experts.png",
    ]
    for file in files:
        height, width, _ = matplotlib.image.imread(file).shape
        assert min(height, width) > 300
        assert matplotlib.image.imread(file)[..., :3].std() > 0.05


def test_a_run_without_figures_to_draw(tmp_path):
    assert (
        plot(
            RunReport.model_validate(report() | {"curves": {}, "clusters": {}, "evaluation": {}}), tmp_path / "figures"
        )
        == []
    )
    assert list(tmp_path.iterdir()) == []


def shown(figure):
    """The smoothed lines and dots of a loss figure: {name: line}."""
    return {
        line.get_label().rpartition("  ")[0]: line
        for line in figure.axes[0].lines
        if not line.get_label().startswith("_")
    }


def test_units_follow_each_other_on_one_axis_and_sub_models_start_together():
    curves = run_report().curves
    figure = draw_loss(dict(reversed(curves.items())))
    lines = shown(figure)
    assert list(lines) == ["seed", "submodel-0", "submodel-1", "submodel-2", "submodel-3", "finetune"]
    seed_end = curves["seed"].tokens[-1]
    merged = seed_end + max(curves[f"submodel-{k}"].tokens[-1] for k in range(4))
    for unit, line in lines.items():
        start = {"seed": 0, "finetune": merged}.get(unit, seed_end)
        assert list(line.get_xdata()) == [start + tokens for tokens in curves[unit].tokens]
    [text] = figure.axes[0].texts
    assert (text.get_text(), text.xy[0]) == ("merge", merged)
    assert len({line.get_color() for unit, line in lines.items() if unit.startswith("submodel")}) == 4


@pytest.mark.parametrize(
    ("stages", "merge"),
    [
        (("seed",), False),
        (("submodels",), False),
        (("finetune",), False),
        (("seed", "finetune"), False),
        (("submodels", "finetune"), True),
    ],
)
def test_the_merge_is_marked_where_sub_models_became_the_whole(stages, merge):
    curves = {unit: curve for unit, curve in run_report().curves.items() if curve.stage in stages}
    figure = draw_loss(curves)
    assert [text.get_text() for text in figure.axes[0].texts] == ["merge"] * merge
    assert min(line.get_xdata()[0] for line in shown(figure).values()) < 10_000


def test_held_out_loss_is_drawn_where_it_was_measured():
    curves = run_report().curves
    held_out = {"finetune": Curve(stage="finetune", tokens=[120_000, 240_000], loss=[4.8, 4.5])}
    lines = shown(draw_loss(curves, held_out))
    dots = lines.pop("finetune, held out")
    assert lines.keys() == curves.keys()
    assert list(dots.get_ydata()) == [4.8, 4.5]
    assert dots.get_xdata()[-1] == lines["finetune"].get_xdata()[-1]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(1, 6))
def test_a_running_mean_stays_within_its_neighbours_and_keeps_the_first_value(values, reach):
    means = running_mean(values, reach)
    assert len(means) == len(values)
    assert means[0] == values[0]
    for i, mean in enumerate(means):
        near = values[max(0, i - reach) : i + reach + 1]
        assert min(near) - 1e-9 <= mean <= max(near) + 1e-9


def test_a_straight_line_is_its_own_running_mean_but_for_its_end():
    line = [float(i) for i in range(30)]
    assert running_mean(line, 4)[:26] == pytest.approx(line[:26])


def test_several_sources_have_a_second_panel():
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


def colours_in(axes):
    return {dots.get_label().split("  ")[0]: tuple(dots.get_facecolor()[0]) for dots in axes.collections}


def test_sources_take_the_colours_of_the_clusters_that_hold_them():
    points = ClusterMap(x=[0.0] * 6, y=[0.0] * 6, cluster=[0, 0, 0, 1, 1, 1], source=["z", "z", "a", "a", "a", "a"])
    clusters, sources = map(colours_in, draw_clusters(points).axes)
    assert sources == {"z": clusters["cluster 0"], "a": clusters["cluster 1"]}


@pytest.mark.parametrize("experts", [1, 4, 60])
def test_experts_are_drawn_as_layers_by_experts(experts):
    figure = draw_experts([RouterRecord(layer=layer, load=[1 / experts] * experts) for layer in range(3)])
    assert figure.axes[0].images[0].get_array().shape == (3, experts)
    assert len(figure.axes[0].texts) == (3 * experts if experts <= 16 else 0)
    figure.canvas.draw()
