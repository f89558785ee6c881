"""The policy learns what a known market teaches, from the past alone, and training says why it ended."""

import pytest
import torch

from minimand.policies import PortfolioPolicy, PriceHistory, portfolio, train_portfolio, walk_forward
from minimand.stopping import Stop


def market(days=200, drift=(0.004, -0.004), seed=0):
    generator = torch.Generator().manual_seed(seed)
    moves = torch.tensor(drift) + 0.01 * torch.randn(days, len(drift), generator=generator)
    return PriceHistory(moves.cumsum(0).exp())


def trained(seed=0, **settings):
    torch.manual_seed(seed)
    policy = PortfolioPolicy(2, window=4, width=4, hidden=16)
    given = {"horizon": 8, "num_episodes": 32, "lr": 5e-3, "epochs": 4, "cost": 0.0, "max_iter": 30} | settings
    return policy, train_portfolio(policy, market(), generator=torch.Generator().manual_seed(seed), **given)


def test_training_finds_the_asset_that_rises_and_beats_equal_weight_on_days_it_has_not_seen():
    policy, result = trained()
    assert sum(result.rewards[-5:]) / 5 > sum(result.rewards[:5]) / 5 + 1
    assert result.rewards[-1] > 0
    unseen = market(seed=1)
    ours = walk_forward(policy.strategy(), unseen, start=10, cost=0.0)
    equal = walk_forward(lambda past, held: torch.tensor([0.5, 0.5]), unseen, start=10, cost=0.0)
    assert float(ours.weights[:, 1].mean()) > 2 * float(ours.weights[:, 2].mean())
    assert ours.summary()["sharpe"] > equal.summary()["sharpe"] + 1


def test_the_same_seed_gives_the_same_training():
    assert trained(max_iter=3)[1].rewards == trained(max_iter=3)[1].rewards


def test_a_policy_does_not_see_the_future():
    policy, _ = trained(max_iter=2)
    true = market()
    scrambled = true.prices.clone()
    scrambled[60:] = scrambled[60:].flip(0)
    one, other = (walk_forward(policy.strategy(), prices, start=10) for prices in (true, PriceHistory(scrambled)))
    assert torch.equal(one.weights[:50], other.weights[:50])
    assert not torch.equal(one.weights[50], other.weights[50])


def test_actions_are_weights_and_only_the_critic_reads_the_progress():
    policy = PortfolioPolicy(3, num_channels=4, window=6)
    image = 1 + 0.02 * torch.randn(5, 4, 7, 3, generator=torch.Generator().manual_seed(0))
    weights = policy.act(image)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    (one, low), (other, high) = policy(image, torch.zeros(5, 3)), policy(image, torch.ones(5, 3))
    assert torch.equal(one, other)
    torch.testing.assert_close(one.softmax(1), weights)
    assert (low != high).all()


@pytest.mark.parametrize(
    ("means", "status"),
    [
        ([0.0, 1.0, 2.0], None),
        ([0.0, 0.0, 1.0, 1.0], None),
        ([1.0, 1.0, 1.0, 1.0], Stop.CONVERGED),
        ([-1.0, -1.0, -1.0, -1.0], Stop.STALLED),
    ],
)
def test_training_ends_when_rewards_are_flat_and_has_converged_if_they_are_above_zero(means, status):
    assert portfolio._flat(means, 2, 0.1) is status


@pytest.mark.untyped
def test_bad_input_is_refused_by_name():
    policy = PortfolioPolicy(2, window=4)
    with pytest.raises(ValueError, match=r"image must have shape \(batch, 1, 5, 2\)"):
        policy.act(torch.ones(1, 1, 5, 3))
    with pytest.raises(ValueError, match="num_assets must be at least 1"):
        PortfolioPolicy(0)
    with pytest.raises(ValueError, match="history must have 2 assets and 1 channels"):
        train_portfolio(policy, market(drift=(0.0,) * 3))
    with pytest.raises(ValueError, match="lr must be"):
        train_portfolio(policy, market(), lr=0.0)
    with pytest.raises(ValueError, match="patience must be"):
        train_portfolio(policy, market(), patience=0)
    with pytest.raises(ValueError, match="reward must return shape"):
        train_portfolio(policy, market(), horizon=8, reward=lambda returns: returns.sum(1))


def test_the_loss_is_the_clipped_surrogate_plus_the_critics_squared_error():
    torch.manual_seed(0)
    policy = PortfolioPolicy(2, window=4, width=4, hidden=16).double()
    generator = torch.Generator().manual_seed(1)
    rows = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (
            ("image", (6, *policy.shape)),
            ("progress", (6, 3)),
            ("action", (6, 3)),
            ("logp", (6,)),
            ("values", (6,)),
            ("advantages", (6,)),
            ("targets", (6,)),
        )
    }
    mean, value = policy(rows["image"], rows["progress"])
    density = torch.distributions.Normal(mean, policy.log_deviation.exp()).log_prob(rows["action"]).sum(-1)
    ratio = (density - rows["logp"]).exp()
    advantages = (rows["advantages"] - rows["advantages"].mean()) / rows["advantages"].std(correction=0)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    wanted = -surrogate + 0.5 * (value - rows["targets"]).square().mean()
    assert torch.allclose(portfolio._loss(policy, rows, 0.2, 0.5), wanted, atol=1e-6)


def test_the_network_reads_how_far_prices_are_from_todays():
    policy = PortfolioPolicy(2, window=4, width=4, hidden=16)
    heard = []
    policy.features[0].register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    image = torch.ones(1, *policy.shape)
    image[:, :, 1:, 0] = 1.01
    image[:, :, 0] = 0.5
    policy.act(image)
    assert torch.equal(heard[0][:, :, 0], image[:, :, 0])
    assert torch.allclose(heard[0][:, :, 1:, 0], torch.tensor(0.01 * portfolio.PRICE_SCALE), rtol=1e-4)
    assert not heard[0][:, :, 1:, 1].any()


def test_training_and_acting_turn_actions_into_weights_by_the_policys_own_map():
    class AllCash(PortfolioPolicy):
        def weights(self, action):
            return torch.eye(action.shape[-1])[0].expand_as(action)

    policy = AllCash(2, window=4, width=4, hidden=16)
    assert (policy.act(torch.ones(3, 1, 5, 2))[:, 0] == 1).all()
    assert train_portfolio(policy, market(), horizon=8, max_iter=1).rewards == (0.0,)
