import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from invdiff.errors import InvdiffError, StoreError
from invdiff.figures import png_bytes, save_png, summary_figure
from invdiff.html import operator_html, prior_html, problem_html
from invdiff.likelihoods import Gaussian
from invdiff.operator import LinearOperator
from invdiff.posterior import Posterior
from invdiff.prior import FunctionDenoiser, Prior
from invdiff.problem import Problem
from invdiff.spaces import Space
from tests.unit.runs import COMPLEX, LINE, REAL, make_run


def titles(figure):
    return [a.get_title() for a in figure.axes if a.get_title()]


def pixels(figure):
    from matplotlib.image import imread

    png = png_bytes(figure, dpi=60)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    import io

    return imread(io.BytesIO(png))


def test_complex_image_shows_all_panels_on_one_grey_scale():
    p = Posterior.from_run(make_run(draws=20))
    figure = p.plot()
    assert titles(figure) == [
        "mean of |x|", "standard deviation of |x|", "width of the 90 % interval of |x|", "|mean - truth|",
        "draw 0", "draw 1", "truth",
    ]  # fmt: skip
    shown = {a.get_title(): a.get_images()[0] for a in figure.axes if a.get_title()}
    assert len({shown[t].get_clim() for t in ("mean of |x|", "draw 0", "draw 1", "truth")}) == 1
    assert shown["draw 0"].cmap.name == "gray" and shown["|mean - truth|"].cmap.name == "viridis"
    left, right, bottom, top = shown["truth"].get_extent()
    assert (right - left, bottom - top) == (7 * 0.5, 9 * 1.5)
    assert "20 draws" in figure.get_suptitle() and "dds" in figure.get_suptitle()
    assert {a.get_ylabel() for a in figure.findobj(Axes)} >= {"y (mm)", "mT"}
    assert pixels(figure)[..., :3].std() > 0.05


def test_without_truth_and_with_failures():
    figure = summary_figure(Posterior.from_run(make_run(REAL.replace(shape=(1, 6, 5)), truth=False, bad=[(0, 0)])))
    assert titles(figure) == ["mean", "standard deviation", "width of the 90 % interval", "draw 1", "draw 2"]
    assert "11 draws (1 left out)" in figure.get_suptitle() and "83%" in figure.get_suptitle()


def test_one_draw_and_point_estimates_show_no_spread():
    one = summary_figure(Posterior.from_run(make_run(draws=1, truth=False)))
    assert titles(one) == ["mean of |x|", "draw 0"]
    point = summary_figure(Posterior.from_run(make_run(kind="point", draws=1)))
    assert titles(point) == ["point estimate", "|error|", "truth"]
    assert "no uncertainty" in point.get_suptitle()


def test_signals_channels_volumes_and_cases():
    line = summary_figure(Posterior.from_run(make_run(LINE, draws=20)))
    labels = [h.get_text() for h in line.axes[0].get_legend().get_texts()]
    assert set(labels) == {"90 % interval", "draw 0", "draw 1", "truth", "mean"}
    pixels(line)
    channels = summary_figure(Posterior.from_run(make_run(REAL, draws=5)))
    assert titles(channels).count("mean") == 2
    volume = Posterior.from_run(make_run(Space((1, 4, 6, 5), spacing={"z": 2, "y": 1, "x": 1}), draws=5))
    rows = [a.get_ylabel() for a in summary_figure(volume).axes if "\n" in a.get_ylabel()]
    assert rows == ["z = 4 mm\ny (mm)", "y = 3 mm\nz (mm)", "x = 2 mm\nz (mm)"]
    cases = Posterior.from_run(make_run(cases=2, draws=4))
    assert "case 1" in summary_figure(cases, 1).get_suptitle()
    with pytest.raises(InvdiffError, match="no case 2"):
        summary_figure(cases, 2)
    pixels(summary_figure(Posterior.from_run(make_run(Space((2, 12), dims=("channel", "t")), draws=5))))


def test_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    figure = Posterior.from_run(make_run(draws=3)).plot()
    path = save_png(figure, tmp_path / "a.png")
    assert path.stat().st_size > 5000 and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(StoreError, match="does not exist"):
        save_png(figure, tmp_path / "no" / "a.png")
    monkeypatch.setattr(type(figure), "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_png(figure, tmp_path / "b.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_title_is_no_mathematics():
    pixels(summary_figure(Posterior.from_run(make_run(LINE, draws=3, title="cost $5 and $x_"))))


class Diagonal(LinearOperator):
    """Elementwise product with a mask, into complex data."""

    def __init__(self, mask, coil_maps):
        self.mask, self.coil_maps = mask, coil_maps
        self.domain = self.range = COMPLEX.replace(shape=(1, 8, 8))

    def _forward(self, x):
        return x * self.mask

    def _adjoint(self, y):
        return y * self.mask


def test_reprs_for_notebooks():
    maps = torch.ones(1, 5, 8, 8, dtype=torch.complex64)
    operator = Diagonal((torch.arange(64).reshape(1, 1, 8, 8) % 2).float(), maps)
    problem = Problem.simulate(operator, Gaussian(0.1), operator.domain.randn(1), meta={"title": "<b>scan</b>"})
    card = {"name": "p", "licence": "<i>", "denoising_error": {"sigma": [0.1, 1.0], "rmse": [0.05, 0.2]}}
    prior = Prior(FunctionDenoiser(lambda x, s: x, Space((1, 8, 8)), 0.01, 80.0), card=card)
    for page in (problem_html(problem), operator_html(operator), operator_html(2 * operator), prior_html(prior)):
        assert "data:image/png;base64," in page and "<b>" not in page and "<i>" not in page
    bare = Prior(prior.denoiser, card={"name": "q"})
    assert "<table>" in prior_html(bare) and "img" not in prior_html(bare)
    assert np.prod(pixels(Posterior.from_run(make_run(draws=3)).plot()).shape) > 0
