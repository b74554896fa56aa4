from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import cnf
from cnf.plotting import (
    animate_path,
    log_density_grid,
    plot_flow,
    plot_path,
    plot_table,
    truncate,
)
from cnf.transforms import CNF, Compose


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


def test_only_a_cnf_has_a_path():
    flow = cnf.Flow(cnf.StandardNormal(2), cnf.Inverse(CNF(lambda t, x: x)))
    with pytest.raises(TypeError, match="Inverse"):
        truncate(flow, 0.5)


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


def test_the_animation_has_its_frames_and_moves(tmp_path):
    path = tmp_path / "path.gif"
    animate_path(linear_flow(1.0), torch.randn(200, 2), path, frames=4, size=8, points=20)
    with Image.open(path) as image:
        assert image.n_frames == 4
        first = image.convert("L").tobytes()
        image.seek(3)
        assert image.convert("L").tobytes() != first
