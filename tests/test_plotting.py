from __future__ import annotations

import json
import math

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import cnf
from cnf.plotting import (
    animate_path,
    log_density_grid,
    plot_densities,
    plot_flow,
    plot_images,
    plot_path,
    plot_samples,
    plot_table,
    plot_training,
    truncate,
)
from cnf.transforms import CNF, Compose, Diagonal


def linear_flow(rate: float, blocks: int = 1) -> cnf.Flow:
    """x = exp(rate * blocks) z: at a fraction s of the path, a normal of sd exp(rate blocks s)."""
    steps = [CNF(lambda t, x: rate * x, "exact") for _ in range(blocks)]
    return cnf.Flow(cnf.StandardNormal(2), Compose(*steps) if blocks > 1 else steps[0])


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_truncated_flow_is_the_density_on_the_way(blocks, fraction):
    x = torch.randn(20, 2)
    sd = torch.tensor(0.5 * blocks * fraction).exp()
    truth = torch.distributions.Normal(0.0, sd).log_prob(x).sum(-1)
    got = truncate(linear_flow(0.5, blocks), fraction).log_prob(x)
    torch.testing.assert_close(got, truth, atol=1e-4, rtol=0)


def test_a_truncated_flow_shares_its_parameters():
    flow = cnf.FFJORD(2, blocks=2)
    part = truncate(flow, 1.0)
    assert {id(p) for p in part.parameters()} == {id(p) for p in flow.parameters()}


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_the_path_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        truncate(cnf.FFJORD(2), fraction)


def discrete_flow() -> cnf.Flow:
    """Scales by e^0.1, e^0.2, e^0.4 in turn."""
    return cnf.Flow(cnf.StandardNormal(2), Compose(*(scaling(r) for r in (0.1, 0.2, 0.4))))


def scaling(rate: float) -> Diagonal:
    layer = Diagonal(2)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(rate if "scale" in name else 0.0)
    return layer


def rate_of(flow: cnf.Flow) -> float:
    """r of the flow x = e^r z."""
    return flow.transform.forward(torch.ones(1, 2)).log().mean().item()


@pytest.mark.parametrize(
    ("fraction", "rate"),
    [(0, 0), (0.3, 0), (1 / 3, 0.1), (0.6, 0.1), (2 / 3, 0.3), (0.99, 0.3), (1, 0.7)],
)
def test_a_discrete_layer_is_in_once_the_path_has_passed_it(fraction, rate):
    part = truncate(discrete_flow(), fraction)
    assert rate_of(part) == pytest.approx(rate, abs=1e-6)
    x = torch.randn(5, 2)
    truth = torch.distributions.Normal(0.0, math.exp(rate)).log_prob(x).sum(-1)
    torch.testing.assert_close(part.log_prob(x), truth)


def test_a_layer_is_not_lost_by_rounding():
    flow = cnf.Flow(cnf.StandardNormal(2), Compose(*(scaling(0.1) for _ in range(49))))
    assert 1 / 49 * 49 < 1
    assert rate_of(truncate(flow, 1 / 49)) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(("fraction", "rate"), [(0, 0), (0.4, -0.4), (0.8, -0.6), (1, -0.7)])
def test_an_inverse_is_walked_from_its_end(fraction, rate):
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.Inverse(discrete_flow().transform))
    assert rate_of(truncate(flow, fraction)) == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize(("fraction", "rate"), [(0.25, -0.25), (0.5, -0.5), (0.75, -0.4)])
def test_parts_within_parts_are_equal_and_a_cnf_is_cut_wherever_it_stands(fraction, rate):
    cut = cnf.Inverse(CNF(lambda t, x: 2 * t * x, "exact"))  # e^-1, and e^-3/4 by half its time
    flow = cnf.Flow(cnf.StandardNormal(2), Compose(cut, cnf.Inverse(cnf.Inverse(scaling(0.1)))))
    expected = {0.25: -0.75, 0.5: -1.0, 0.75: -1.0}[fraction]
    assert rate_of(truncate(flow, fraction)) == pytest.approx(expected, abs=1e-4)
    nested = Compose(Compose(scaling(-0.25), scaling(-0.25)), Compose(scaling(0.1), scaling(0.1)))
    flow = cnf.Flow(cnf.StandardNormal(2), nested)
    assert rate_of(truncate(flow, fraction)) == pytest.approx(rate, abs=1e-6)


def test_a_discrete_path_is_shown_layer_by_layer(tmp_path):
    data = torch.randn(200, 2)
    titles = [ax.get_title() for ax in plot_path(discrete_flow(), data, size=8).axes]
    assert titles == ["base", "layer 1 of 3", "layer 2 of 3", "layer 3 of 3"]
    titles = [ax.get_title() for ax in plot_path(discrete_flow(), data, frames=3, size=8).axes]
    assert titles == ["base", "layer 1 of 3", "layer 3 of 3"]
    animate_path(discrete_flow(), data, tmp_path / "path.gif", size=8, points=20)
    with Image.open(tmp_path / "path.gif") as image:
        assert image.n_frames == 4
        assert image.info["duration"] == 500  # two seconds in all


def test_the_grid_has_x_along_columns_and_y_along_rows():
    grid = log_density_grid(
        lambda p: p[:, 0] + 10 * p[:, 1], (0.0, 1.0, 2.0, 4.0), 3, like=torch.zeros(())
    )
    expected = torch.tensor([[20.0, 20.5, 21.0], [30.0, 30.5, 31.0], [40.0, 40.5, 41.0]])
    torch.testing.assert_close(grid, expected)


def test_figures_show_what_was_asked(tmp_path):
    flow, data = linear_flow(0.5), torch.randn(500, 2)
    figure = plot_flow(flow, data, samples=100, size=10)
    assert [ax.get_title() for ax in figure.axes] == ["data", "samples", "density"]
    figure = plot_flow(flow, data, truth=flow.log_prob, samples=100, size=10)
    assert figure.axes[3].get_title() == "true density"
    model, true = (ax.images[0].get_array() for ax in figure.axes[2:])
    assert abs(model - true).max() < 1e-6  # the flow is its own truth here
    assert len(plot_path(flow, data, frames=4, size=8).axes) == 4
    assert isinstance(plot_table(torch.randn(50, 3), torch.randn(60, 3)), Figure)
    with pytest.raises(ValueError, match="frames"):
        plot_path(flow, data, frames=1)


def test_densities_stand_side_by_side_on_one_scale():
    flow, data = linear_flow(0.5), torch.randn(500, 2)
    shown = {"true": flow.log_prob, "flow": flow.log_prob, "narrow": linear_flow(-1.0).log_prob}
    figure = plot_densities(shown, data, columns=2, size=10)
    assert [ax.get_title() for ax in figure.axes if ax.axison] == list(shown)
    true, model, narrow = (ax.images[0] for ax in figure.axes[:3])
    assert abs(true.get_array() - model.get_array()).max() == 0
    assert true.get_clim() == narrow.get_clim() == (0, true.get_array().max())
    assert narrow.get_array().max() > true.get_array().max()


def test_samples_stand_side_by_side_in_the_limits_of_the_first():
    data = torch.randn(500, 3)
    shown = {"data": data, "flow": 100 * torch.randn(300, 3)}
    one, two = plot_samples(shown, dims=(2, 0)).axes
    assert (one.get_title(), two.get_title()) == ("data", "flow")
    assert one.get_xlim() == two.get_xlim()
    points = [torch.tensor(ax.collections[0].get_offsets()) for ax in (one, two)]
    torch.testing.assert_close(points[0], data[:300, [2, 0]].double())
    assert len(points[1]) == 300


def test_the_animation_has_its_frames_and_moves(tmp_path):
    path = tmp_path / "path.gif"
    animate_path(linear_flow(1.0), torch.randn(200, 2), path, frames=4, size=8, points=20)
    with Image.open(path) as image:
        assert image.n_frames == 4
        first = image.convert("L").tobytes()
        image.seek(3)
        assert image.convert("L").tobytes() != first


def test_images_stand_in_grids_each_in_its_place():
    grey = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    colours = torch.zeros(2, 3, 2, 3, dtype=torch.uint8)
    colours[1, 2] = 4
    figure = plot_images({"grey": grey, "colours": colours}, levels=5, columns=2)
    assert [ax.get_title() for ax in figure.axes] == ["grey", "colours"]
    first, second = (ax.images[0].get_array() for ax in figure.axes)
    assert first.shape == (3 * 3 + 1, 2 * 4 + 1, 3)  # two in a row, lines around each
    for k in range(5):
        row, column = divmod(k, 2)
        place = first[3 * row + 1 : 3 * row + 3, 4 * column + 1 : 4 * column + 4]
        assert (place == k / 4).all(), k
    assert (first[7:9, 5:8] == 0.5).all(), "there is no sixth"
    assert second[1:3, 5:8].reshape(-1, 3).tolist() == [[0, 0, 1]] * 6
    assert figure.axes[0].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 2, 8, 8), (0, 1, 8, 8)])
def test_what_are_no_images_is_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\)"):
        plot_images({"data": torch.zeros(shape, dtype=torch.uint8)})


def test_training_is_drawn_from_logs(tmp_path):
    for name, factor in (("one", 1.0), ("two", 2.0)):
        lines = [{"step": i, "loss": factor * (1 + 1 / i), "elapsed": i} for i in range(1, 60)]
        lines.insert(30, {"step": 30, "val_loss": 1.5 * factor, "elapsed": 30})
        lines.append({"step": 60, "loss": None, "elapsed": 60})  # was not finite
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    figure = plot_training({n: tmp_path / n for n in ("one", "two")}, ylabel="bits/dim")
    (ax,) = figure.axes
    drawn = {line.get_label(): line for line in ax.lines}
    assert list(drawn) == [f"{n}, {k}" for n in ("one", "two") for k in ("batches", "validation")]
    assert drawn["two, batches"].get_xdata()[0] == 1
    assert drawn["two, batches"].get_ydata()[1] == 3
    assert len(drawn["two, batches"].get_ydata()) == 59
    assert drawn["one, validation"].get_xydata().tolist() == [[30, 1.5]]
    low, high = ax.get_ylim()
    assert low < 1 + 1 / 59
    assert high < 4, "the first losses are far above the others"
    assert ax.get_ylabel() == "bits/dim"


@pytest.mark.parametrize("draw", [plot_flow, plot_path])
def test_a_flow_of_integers_has_no_density_to_draw(draw) -> None:
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.UniformDequantization(17))
    with pytest.raises(TypeError, match="of integers"):
        draw(flow, torch.randint(17, (5, 2)))


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        (torch.zeros(2, 1, 3, 3), {}, TypeError, "by title"),
        ({"x": [[0]]}, {}, TypeError, "must be tensors"),
        ({}, {}, ValueError, "empty"),
        ({"x": torch.rand(2, 1, 3, 3)}, {}, ValueError, "fractions"),
        ({"x": torch.full((2, 1, 3, 3), 9)}, {"levels": 8}, ValueError, "from 0 to"),
        ({"x": torch.zeros(0, 1, 3, 3)}, {}, ValueError, "N one or more"),
        ({"x": torch.zeros(2, 2, 3, 3)}, {}, ValueError, "C 1 or 3"),
        ({"x": torch.zeros(2, 1, 3, 3)}, {"columns": 0}, ValueError, "columns=0"),
    ],
)
def test_what_is_no_image_is_not_drawn(images, options, error, words) -> None:
    with pytest.raises(error, match=words):
        plot_images(images, **options)
