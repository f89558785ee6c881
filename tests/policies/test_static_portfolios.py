"""Minimum variance, tangency and risk parity against closed forms and cvxpy; shrinkage against scikit-learn."""

import cvxpy
import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from minimand.policies import maximum_sharpe, minimum_variance, risk_parity, sharpe_ratio, shrunk_moments
from minimand.stopping import Stop


def moments(assets=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * assets, assets, generator=generator, dtype=torch.float64)
    rows = rows + 0.7 * rows[:, :1]
    return 0.05 + 0.1 * torch.rand(assets, generator=generator, dtype=torch.float64), 1e-4 * rows.T @ rows


@pytest.mark.parametrize("seed", range(5))
def test_minimum_variance_and_tangency_are_those_of_a_quadratic_program(seed):
    mean, covariance = moments(seed=seed)
    for ours, linear in ((minimum_variance(covariance), np.ones(6)), (maximum_sharpe(mean, covariance), mean.numpy())):
        point = cvxpy.Variable(6, nonneg=True)
        risk = cvxpy.quad_form(point, cvxpy.psd_wrap(1e3 * covariance.numpy()))
        cvxpy.Problem(cvxpy.Minimize(risk), [linear @ point == 1]).solve(solver="CLARABEL")
        np.testing.assert_allclose(ours, point.value / point.value.sum(), atol=1e-4)


def test_where_no_bound_binds_the_tangency_portfolio_has_its_closed_form():
    _, covariance = moments()
    wanted = torch.linspace(1, 2, 6, dtype=torch.float64) / 9
    torch.testing.assert_close(maximum_sharpe(covariance @ wanted * 3, covariance), wanted)
    torch.testing.assert_close(minimum_variance(torch.diag(1 / wanted)), wanted)


def test_ascending_the_sharpe_ratio_itself_reaches_the_tangency_portfolio():
    # Simple returns linear in the weights: only then is the ratio of the series that of its moments.
    generator = torch.Generator().manual_seed(1)
    series = 0.01 * torch.randn(300, 4, generator=generator, dtype=torch.float64)
    series = series - series.mean(0) + torch.tensor([1.0, 1.2, 0.9, 1.1], dtype=torch.float64) * 1e-3
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -sharpe_ratio(series @ logits.softmax(-1))
        loss.backward()
        return loss

    optimizer.step(closure)
    tangency = maximum_sharpe(series.mean(0), torch.cov(series.T))
    solved = torch.linalg.solve(torch.cov(series.T), series.mean(0))
    torch.testing.assert_close(tangency, solved / solved.sum())
    torch.testing.assert_close(logits.detach().softmax(-1), tangency, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_in_risk_parity_every_asset_bears_the_same_share_and_no_other_portfolio_does(seed):
    _, covariance = moments(seed=seed)
    result = risk_parity(covariance, tolerance=1e-12)
    assert result.status is Stop.CONVERGED
    shares = result.weights * (covariance @ result.weights)
    torch.testing.assert_close(shares / shares.sum(), torch.full((6,), 1 / 6, dtype=torch.float64))
    assert float(result.weights.sum()) == pytest.approx(1)
    point = cvxpy.Variable(6, pos=True)
    objective = cvxpy.quad_form(point, cvxpy.psd_wrap(1e3 * covariance.numpy())) / 2 - cvxpy.sum(cvxpy.log(point)) / 6
    cvxpy.Problem(cvxpy.Minimize(objective)).solve(solver="CLARABEL")
    np.testing.assert_allclose(result.weights, point.value / point.value.sum(), atol=1e-4)


def test_risk_parity_is_inverse_volatility_where_correlations_are_equal():
    deviation = torch.tensor([1.0, 2.0, 5.0, 0.1], dtype=torch.float64)
    correlation = torch.full((4, 4), 0.4, dtype=torch.float64).fill_diagonal_(1.0)
    result = risk_parity(correlation * deviation[:, None] * deviation)
    torch.testing.assert_close(result.weights, (1 / deviation) / (1 / deviation).sum())
    assert result.iterations == 0  # the start is the solution


def test_risk_parity_converges_where_assets_nearly_coincide():
    deviation = torch.logspace(-3, 1, 20, dtype=torch.float64)
    signs = torch.ones(20, dtype=torch.float64)
    signs[7] = -1
    correlation = 0.999 * signs[:, None] * signs + 0.001 * torch.eye(20, dtype=torch.float64)
    result = risk_parity(correlation * deviation[:, None] * deviation, tolerance=1e-9)
    assert result.status is Stop.CONVERGED


def test_the_covariance_is_scikit_learns_and_definite_with_fewer_days_than_assets():
    rows = 0.01 * torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, covariance = shrunk_moments(rows)
    np.testing.assert_allclose(covariance, ledoit_wolf(rows.numpy())[0])
    torch.testing.assert_close(mean, rows.mean(0))
    assert float(minimum_variance(covariance).sum()) == pytest.approx(1)


@pytest.mark.untyped
def test_bad_input_is_refused_by_name():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="covariance must be positive definite: shrink it"):
        minimum_variance(torch.ones(2, 2))
    with pytest.raises(ValueError, match="covariance must be symmetric"):
        risk_parity(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="covariance must have shape"):
        risk_parity(torch.ones(2, 3))
    with pytest.raises(ValueError, match="mean must be above 0 for some asset"):
        maximum_sharpe(torch.tensor([-1.0, 0.0]), eye)
    with pytest.raises(ValueError, match="mean must have shape"):
        maximum_sharpe(torch.ones(3), eye)
    with pytest.raises(ValueError, match="returns must vary"):
        shrunk_moments(torch.ones(3, 2))
    with pytest.raises(ValueError, match="at least two days"):
        shrunk_moments(torch.ones(1, 2))
    with pytest.raises(ValueError, match="tolerance must be"):
        risk_parity(eye, tolerance=0.0)
