"""Laws of returns: what is drawn of them is what they are."""

import numpy as np
import pytest
import torch

from minimand.policies import ReturnLaw

LAW = ReturnLaw(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([0.5, 0.25, 0.25]))


def heights(line, places):
    """Read a step line at places: the height of the last step begun."""
    x, y = (np.asarray(values, dtype=float) for values in line.get_data())
    return y[np.searchsorted(x, places, side="right") - 1]


def test_the_drawn_step_is_the_law_and_the_drawn_masses_add_up_to_one():
    other = ReturnLaw(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 0.5]))
    masses, below = LAW.draw(others={"other": other}).axes
    for line, law in zip(below.get_lines(), (LAW, other), strict=True):
        places = np.linspace(-0.15, 4.15, 87)
        wanted = [float(law.weights[law.atoms <= place].sum()) for place in places]
        assert heights(line, places) == pytest.approx(wanted, abs=1e-6)
    for lines, law in zip(masses.collections, (LAW, other), strict=True):
        drawn = {round(float(top[0]), 1): float(top[1]) for _, top in lines.get_segments()}
        assert drawn == pytest.approx(dict(zip(law.atoms.tolist(), law.weights.tolist(), strict=True)))


@pytest.mark.parametrize("tau", [0.1, 0.25, 0.4, 0.8, 1.0])
def test_the_shaded_area_is_what_the_tail_mean_is_short_of_the_border(tau):
    figure = LAW.draw(tau=tau)
    (shade,) = figure.axes[1].collections
    corners = shade.get_paths()[0].vertices
    x, y = corners[:, 0], corners[:, 1]
    area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    border = float(LAW.atoms.sort().values[int(np.searchsorted([0.25, 0.5, 1.0], tau))])
    assert area == pytest.approx(tau * (border - LAW.cvar(tau).item()), abs=1e-6)
    marked = [line.get_xdata()[0] for line in figure.axes[1].get_lines() if "worst" in str(line.get_label())]
    assert marked == [pytest.approx(LAW.cvar(tau).item())]


def test_many_atoms_are_drawn_as_ranges_that_hold_all_of_them():
    atoms = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (ranges,) = ReturnLaw(atoms, torch.full_like(atoms, 1 / 500)).draw().axes[0].patches
    assert ranges.get_data().values.sum() == pytest.approx(1.0)


def test_a_law_of_vectors_is_drawn_as_a_map_whose_areas_are_probabilities():
    law = ReturnLaw(torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([0.25, 0.75]))
    points, mean = law.draw().axes[0].collections
    assert points.get_offsets().tolist() == law.atoms.tolist()
    assert points.get_sizes()[1] == pytest.approx(3 * points.get_sizes()[0])
    assert mean.get_offsets().tolist() == [law.mean().tolist()]


@pytest.mark.untyped
def test_what_cannot_be_drawn_is_refused():
    planar = ReturnLaw(torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="one or two entries"):
        ReturnLaw(torch.zeros(1, 3), torch.ones(1)).draw()
    with pytest.raises(ValueError, match="alike one or two"):
        LAW.draw(others={"planar": planar})
    with pytest.raises(ValueError, match="names of their own"):
        LAW.draw(name="a", others={"a": LAW})
    with pytest.raises(ValueError, match="tau is for returns"):
        planar.draw(tau=0.5)
    with pytest.raises(ValueError, match="tau must lie in"):
        LAW.draw(tau=0.0)
