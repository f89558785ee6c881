"""What every public function of the numerical rooms keeps: finite numbers from finite ones, an error from NaN."""

import dataclasses
import importlib
import inspect

import pytest
import torch

from minimand import bounds, constraints, online, optim, policies, preferences, transport

ROOMS = ("constraints", "transport", "optim", "bounds", "preferences", "policies", "online")


def finite(value):
    """Walk a result and tell whether every number in it is finite."""
    if isinstance(value, str):
        return True
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all()) if value.is_floating_point() else True
    if isinstance(value, float):
        return abs(value) < float("inf")
    if isinstance(value, dict):
        return all(finite(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return all(finite(one) for one in value)
    return all(finite(one) for one in vars(value).values()) if hasattr(value, "__dict__") else True


def vector(x, size=4):
    return torch.linspace(-1, 1, size, dtype=torch.float64) + x


ROWS = torch.stack([vector(0.0), -vector(0.0)])
EVEN = torch.full((4,), 0.25, dtype=torch.float64)
LENGTHS = {"chosen_lengths": torch.tensor([1, 2, 3, 4]), "rejected_lengths": torch.tensor([4, 3, 2, 1])}


def regression(x):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, bias=False).double()
    return model, torch.nn.MSELoss(), (ROWS + x, torch.ones(2, 1, dtype=torch.float64))


LOOP = {"lipschitz": 2.0, "expert_lipschitz": 1.0, "input_gain": 0.5, "contraction": 0.5, "cost_lipschitz": 1.0}


def classification(x, weight=False):
    """A classifier of the sign of the first feature, its inputs, and labels that it gets right."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False).double()).eval()
    model[0].weight.data = torch.tensor([[-1.0, 0, 0, 0.1], [1.0, 0, 0, 0]], dtype=torch.float64) + x * weight
    return model, ROWS + x, torch.tensor([0, 1])


def curvature(x):
    """The product with the Hessian of a quadratic function."""
    weight = (vector(0.0) + x).requires_grad_()
    return policies.fisher_product(weight.square().sum(), [weight])


class Levers:
    """One lever pays in one reward, the other in the other."""

    observation_size, num_objectives, action_size, discrete = 1, 2, 2, True

    def __init__(self, num_episodes, seed):
        self.num_episodes = num_episodes

    def reset(self):
        return torch.zeros(self.num_episodes, 1)

    def step(self, action):
        over = torch.ones(self.num_episodes, dtype=torch.bool)
        return policies.VectorStep(self.reset(), torch.eye(2)[action], over, ~over, self.reset())


PAIRS = [preferences.TokenPair((1, 2), (3,), (4, 5))]


def language_model(x):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).eval()
    model.lm_head.weight.data += x
    return model


def two_answers(x):
    """Log-probabilities of two pairs of answers under a policy of four weights, and these."""
    weight = (vector(0.0) + x).requires_grad_()
    return weight[:2] * 3, weight[2:] * weight[0], [weight]


def whole(matrix):
    """Integers where there are only such: a float tensor is refused by its dtype."""
    return matrix.long() if torch.isfinite(matrix).all() else matrix


def constrained(weight):
    weight = torch.nn.Parameter(weight)
    constraints.constrain(torch.optim.SGD([weight], lr=0.1), constraints.Ball(1.0))
    return weight


def exchanged(gradient):
    """Send a gradient by the communication hook, in a group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(4, 1, bias=False).double()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        state = optim.CompressionState(parallel, optim.EF21(optim.TopK(0.5)))
        parallel.register_comm_hook(state, optim.compression_hook)
        parallel(gradient[None]).sum().backward()
        return model.weight.grad
    except RuntimeError as error:  # the kind in which a future hands on whatever was raised within
        raise ValueError(str(error)) from error
    finally:
        torch.distributed.destroy_process_group()


FIXED = {"diameter": 2.0, "grad_bound": 4.0, "smoothness": 1.0}


# Name to a call on data to which ``x`` is added: 0.0, or NaN to see it refused.
def pendulum_log(x):
    log = policies.Pendulum(episode_steps=10).log("mixed", episodes=3)
    return dataclasses.replace(log, reward=log.reward + x)


FUNCTIONS = {
    "fitted_q_evaluation": lambda x: (
        policies.fitted_q_evaluation(pendulum_log(x), [policies.Pendulum.controller], steps=3, hidden=(4,))[0].members
    ),
    "fine_tune": lambda x: (
        policies.fine_tune(
            policies.IQL(3, 1, hidden=(4,)),
            pendulum_log(0.0),
            policies.Pendulum(episode_steps=4),
            scaled=policies.ScaledLog.of(pendulum_log(0.0)),
            rounds=1,
            batch_size=4,
            exploration=0.1 + x,
        ).returns
    ),
    "train_offline": lambda x: policies.train_offline(
        policies.TD3BC(3, 1, hidden=(4,)), policies.ScaledLog.of(pendulum_log(x)), steps=2, batch_size=4
    ).losses["critic"],
    "train_online": lambda x: (
        policies.train_online(
            policies.Pendulum(episode_steps=4),
            rounds=2,
            warmup_rounds=1,
            hidden=(4,),
            batch_size=4,
            exploration=0.1 + x,
        ).replay.reward
    ),
    "coverage_threshold": lambda x: policies.coverage_threshold(vector(x), alpha=0.5),
    "guarded_rollout": lambda x: policies.guarded_rollout(
        policies.GaussianPolicy(2, 1, low=0.0, high=1.0).double(),
        policies.DoseSimulator().step,
        ROWS[:, 2:] + x,
        horizon=3,
    ),
    "history_rows": lambda x: policies.history_rows(ROWS + x, torch.tensor([True, False]), length=2),
    "logged_rows": lambda x: policies.logged_rows(
        policies.Transitions(ROWS + x, ROWS, ROWS[:, 0], ROWS, torch.tensor([True, True]), torch.tensor([False, False]))
    ),
    "monomials": lambda x: policies.monomials(ROWS + x, degree=2),
    "train_portfolio": lambda x: policies.train_portfolio(
        policies.PortfolioPolicy(2, window=2, width=2, hidden=4),
        policies.PriceHistory((torch.linspace(1, 2, 24) + x).view(12, 2)),
        horizon=4,
        max_iter=1,
    ),
    "maximum_sharpe": lambda x: policies.maximum_sharpe(EVEN + x, torch.eye(4, dtype=torch.float64)),
    "minimum_variance": lambda x: policies.minimum_variance(torch.eye(4) + x),
    "risk_parity": lambda x: policies.risk_parity(torch.eye(4) + x).weights,
    "shrunk_moments": lambda x: policies.shrunk_moments(ROWS + x),
    "drift": lambda x: policies.drift(EVEN, vector(x) + 2),
    "portfolio_log_returns": lambda x: policies.portfolio_log_returns(EVEN.expand(2, 4), ROWS + 2 + x),
    "price_image": lambda x: policies.price_image(
        (ROWS + 2 + x).view(4, 2, 1), torch.tensor([3]), EVEN[None, 1:] * 4 / 3, window=2
    ),
    "walk_forward": lambda x: policies.walk_forward(
        lambda past, held: EVEN[:2] * 2 + x, policies.PriceHistory((ROWS + 2).view(4, 2)), start=0
    ),
    "backtracking": lambda x: policies.backtracking(vector(x), lambda step: step[0] > -0.9),
    "conjugate_gradients": lambda x: policies.conjugate_gradients(lambda v: 2 * v, vector(x)),
    "fisher_product": lambda x: curvature(x)(vector(0.0)),
    "advantage_guided_target": lambda x: policies.advantage_guided_target(
        ROWS.mT,
        -ROWS.mT,
        logged_value=vector(x),
        proposal_value=vector(0.0),
        state_value=EVEN,
    ),
    "trust_region_step": lambda x: policies.trust_region_step(
        vector(x), lambda v: 2 * v, constraint_gradients=ROWS, violations=vector(0.0, 2)
    ),
    "edit_stock": lambda x: policies.edit_stock(vector(x), torch.arange(4), vector(0.0), discount=0.9),
    "crowding_distance": lambda x: policies.crowding_distance(ROWS + x).isinf().double(),
    "expected_utility": lambda x: policies.expected_utility(ROWS + x, EVEN[None]),
    "hypervolume": lambda x: policies.hypervolume(ROWS + 2 + x, EVEN),
    "non_dominated": lambda x: policies.non_dominated(ROWS + x),
    "sparsity": lambda x: policies.sparsity(ROWS + x),
    "weight_grid": lambda x: policies.weight_grid(3, divisions=int(2 + x)),
    "quantile_huber_loss": lambda x: policies.quantile_huber_loss(ROWS + x, ROWS.flip(0)),
    "train_stock_agent": lambda x: policies.train_stock_agent(
        policies.StockAgent(policies.StockQuantileNetwork(2, 2), policies.ExpectedUtility.mean(), discount=1.0),
        policies.MDPEnvironment(
            policies.StockMDP(torch.ones(1, 2, 1), torch.tensor([1.0, -1.0 + x]).view(1, 2, 1), discount=1.0),
            0,
            horizon=2,
        ),
        first_stock=(0.0, 1.0),
        num_steps=8,
        learning_starts=0,
    ),
    "extension_thresholds": lambda x: policies.extension_thresholds(vector(x)),
    "interior_point_barrier": lambda x: policies.interior_point_barrier(vector(x)),
    "train_c_morl": lambda x: (
        policies.train_c_morl(
            Levers, reference=torch.zeros(2) + x, max_iter=1, settings=policies.PPOSettings(num_steps=8)
        ).archive.returns
    ),
    "stock_update": lambda x: policies.stock_update(vector(x), vector(0.0), discount=0.9),
    "wealth_after_trade": lambda x: policies.wealth_after_trade(EVEN, EVEN.flip(0) + x),
    "exploration_bonus": lambda x: online.exploration_bonus(
        ROWS[None] / 2 + x, torch.eye(4, dtype=torch.float64), EVEN[:2][None] * 2, scale=0.1
    ),
    "inverse_covariance": lambda x: online.inverse_covariance(ROWS + x, regularization=0.1),
    "linear_q_estimate": lambda x: online.linear_q_estimate(
        ROWS / 2, vector(x) / 2, torch.tensor(1.0).double(), torch.eye(4).double()
    ),
    "exploration_weights": lambda x: online.exploration_weights(torch.tensor([-1, 1]), int(2 + x)),
    "linear_q_weights": lambda x: online.linear_q_weights(ROWS / 2, vector(x, 2), torch.eye(4, dtype=torch.float64)),
    "log_barrier_step": lambda x: online.log_barrier_step(vector(x), learning_rate=0.5),
    "magnitude_reduced_estimate": lambda x: online.magnitude_reduced_estimate(
        ROWS / 2,
        vector(x) / 2,
        torch.tensor(1.0).double(),
        torch.eye(4).double(),
        largest=2.0,
        reference=ROWS / 2,
    ),
    "matrix_geometric_resampling": lambda x: online.matrix_geometric_resampling(ROWS[None] / 2 + x, regularization=0.1),
    "complexity": lambda x: online.complexity(vector(x), torch.eye(4, dtype=torch.float64)),
    "gap_search": lambda x: online.gap_search(ROWS.abs() + x, ROWS, hypotheses=torch.eye(4, dtype=torch.float64)),
    "generalized_binary_search": lambda x: online.generalized_binary_search(
        ROWS.abs() + x, ROWS.abs(), hypotheses=online.thresholds(4)
    ),
    "thresholds": lambda x: online.thresholds(int(4 + x)),
    "train_robust_policy": lambda x: online.train_robust_policy(
        online.QueryNetwork(2, budget=2, hidden=(4,)),
        online.QueryGame(online.thresholds(2), budget=2),
        radii=torch.tensor([6.0 + x]),
        num_instances=4,
        num_steps=2,
    ),
    "train_sampled_policy": lambda x: online.train_sampled_policy(
        online.QueryScorer(online.thresholds(2), budget=2, hidden=(4,)),
        online.SampledQueryGame(online.thresholds(2), budget=2),
        radii=torch.tensor([6.0 + x]),
        num_instances=4,
        games=2,
        num_steps=2,
    ),
    "uniform_allocation": lambda x: online.uniform_allocation(ROWS.abs() + x, ROWS.abs()),
    "inverse_gap_weights": lambda x: online.inverse_gap_weights(vector(x), gamma=4.0),
    "play_bandit": lambda x: online.play_bandit(
        online.NeuralCB(torch.nn.Linear(4, 2).double()),
        online.ClassificationBandit(ROWS + x, torch.tensor([0, 1])),
        num_rounds=3,
    ),
    "online_regression_loss": lambda x: online.online_regression_loss(ROWS + x, vector(0.0).sigmoid()),
    "average_sharpe_rewards": lambda x: policies.average_sharpe_rewards(vector(x)),
    "differential_sharpe_rewards": lambda x: policies.differential_sharpe_rewards(vector(x)),
    "drawdowns": lambda x: policies.drawdowns(vector(x)),
    "prefix_sharpe_ratios": lambda x: policies.prefix_sharpe_ratios(vector(x)),
    "sharpe_ratio": lambda x: policies.sharpe_ratio(vector(x)),
    "sortino_ratio": lambda x: policies.sortino_ratio(vector(x)),
    "acyclicity": lambda x: constraints.acyclicity(vector(x).view(2, 2).square() / 4),
    "kkt_residual": lambda x: constraints.kkt_residual(vector(x).view(2, 2), torch.zeros(2, 2)),
    "order_score": lambda x: constraints.order_score(torch.eye(2) + x, [1, 0]),
    "prune_edges": lambda x: constraints.prune_edges(torch.eye(2) + x, torch.eye(2).roll(1, 1).triu(1), num_rows=9),
    "reachability": lambda x: constraints.reachability(vector(x).view(2, 2)),
    "swap_change": lambda x: constraints.swap_change(torch.eye(2) + x),
    "topological_order": lambda x: constraints.topological_order(vector(x).view(2, 2).triu(1)),
    "augmented_lagrangian": lambda x: constraints.augmented_lagrangian(vector(x), vector(2.0)),
    "best_bag_size": lambda x: bounds.best_bag_size(20.0 + x, epsilon=2.0, clip=2.0),
    "best_rho": lambda x: bounds.best_rho(10.0 + x, bag_size=5),
    "binary_kl_inverse": lambda x: bounds.binary_kl_inverse(0.1 + x, 0.2),
    "closed_loop_bounds": lambda x: constraints.closed_loop_bounds(**LOOP, policy_error=0.1 + x),
    "comp_sum_bound": lambda x: bounds.comp_sum_bound(vector(x).square(), tau=1.0, num_classes=10),
    "comp_sum_transform": lambda x: bounds.comp_sum_transform(vector(x).square(), tau=1.0, num_classes=10),
    "conditional_regret": lambda x: bounds.conditional_regret(vector(x).softmax(-1), vector(0.0), tau=1.0),
    "constrain": lambda x: constrained(vector(x).view(2, 2)),
    "exact_augmented_lagrangian": lambda x: constraints.exact_augmented_lagrangian(
        lambda y: y.square().sum(), lambda y: y[:2], vector(x), vector(1.0, 2)
    ),
    "compression_hook": lambda x: exchanged(vector(x)),
    "econtrol_step": lambda x: optim.econtrol_step(
        optim.WorkerState(vector(0.0), vector(0.0)), vector(x), optim.TopK(k=2), eta=0.1
    ),
    "ensemble_step": lambda x: optim.ensemble_step(
        optim.EnsembleState.at(vector(0.0), learners=2), vector(x), step_sizes=torch.tensor([0.1, 0.2]), **FIXED
    ),
    "ensemble_step_sizes": lambda x: optim.ensemble_step_sizes(100, **{**FIXED, "smoothness": 1.0 + x}),
    "exact_penalty": lambda x: constraints.exact_penalty(vector(x)),
    "fill_distance": lambda x: constraints.fill_distance(ROWS, ROWS + 1 + x),
    "fill_failure_probability": lambda x: constraints.fill_failure_probability(
        num_samples=100, num_balls=10, ball_probability=0.1 + x
    ),
    "generalization_measures": lambda x: bounds.generalization_measures(*classification(x)),
    "interpolation_risk": lambda x: bounds.interpolation_risk(10.0 + x, bag_size=5, rho=1.0),
    "lipschitz_regression": lambda x: constraints.lipschitz_regression(ROWS, ROWS + x, lipschitz=0.5),
    "log_barrier": lambda x: constraints.log_barrier(vector(x)),
    "margin_quantile": lambda x: bounds.margin_quantile(ROWS + x, torch.tensor([3, 0])),
    "mcshane_extension": lambda x: constraints.mcshane_extension(ROWS + 1 + x, ROWS, ROWS, lipschitz=0.5),
    "measure_sea": lambda x: optim.measure_sea(ROWS[..., None] + x),
    "measurement_attack": lambda x: constraints.measurement_attack(
        lambda state: -state,
        lambda state, control: state + control,
        ROWS + x,
        radius=0.1,
        value=lambda state: state[:, 0],
    ),
    "aggregate_rewards": lambda x: preferences.aggregate_rewards(ROWS + x, method="uncertainty-weighted"),
    "best_of_n": lambda x: preferences.best_of_n(ROWS + x, 2),
    "best_of_n_curve": lambda x: preferences.best_of_n_curve(ROWS + x, ROWS, [1, 4]),
    "best_of_n_kl": lambda x: preferences.best_of_n_kl(4 if x == 0 else x),
    "best_of_n_weights": lambda x: preferences.best_of_n_weights(9, 4 if x == 0 else x),
    "expected_best_of_n": lambda x: preferences.expected_best_of_n(ROWS + x, ROWS, 2),
    "fit_reward_heads": lambda x: preferences.fit_reward_heads(
        preferences.RewardHeads(4, hidden=()), ROWS + x, ROWS.flip(0), epochs=2
    ),
    "pairwise_reward_loss": lambda x: preferences.pairwise_reward_loss(vector(x), vector(0.5)),
    "bradley_terry": lambda x: preferences.bradley_terry(torch.eye(2) / 2 + torch.ones(2, 2).triu(1) + x),
    "inpo_loss": lambda x: preferences.inpo_loss(
        vector(0.3), vector(0.1), vector(0.0), vector(0.2), prev_logp_chosen=vector(x), prev_logp_rejected=vector(0.0)
    ),
    "tournament": lambda x: preferences.tournament(
        vector(0.0), vector(0.0, 8).view(4, 2), lambda prompts, first, second: (first > second).double() + x
    ),
    "clipped_policy_loss": lambda x: preferences.clipped_policy_loss(vector(x), vector(0.0), vector(0.5)),
    "clipped_value_loss": lambda x: preferences.clipped_value_loss(vector(x), vector(0.0), vector(0.5)),
    "adversarial_value": lambda x: preferences.adversarial_value(vector(x), vector(0.0).softmax(-1), EVEN),
    "coverage_coefficient": lambda x: preferences.coverage_coefficient(
        ROWS + x, vector(x).square(), vector(0.0).softmax(-1), EVEN, torch.full((4, 4), 1 / 16, dtype=torch.float64)
    ),
    "entanglement": lambda x: preferences.entanglement(*two_answers(x)),
    "first_order_change": lambda x: preferences.first_order_change(*two_answers(x)[1:], [vector(1.0)]),
    "last_linear_layers": lambda x: preferences.last_linear_layers(language_model(0.0), num_blocks=int(1 + x)),
    "margin_coefficients": lambda x: preferences.margin_coefficients(
        preferences.DPOLoss(), preferences.PairLogProbabilities(vector(x), vector(0.1), vector(0.0), vector(0.2))
    ),
    "masked_log_probabilities": lambda x: preferences.masked_log_probabilities(
        preferences.PairTokens(ROWS, ROWS, ROWS < 9, ROWS < 9), ROWS.sigmoid() + x, ROWS.sigmoid()
    ),
    "normalized_pair_gradient": lambda x: preferences.normalized_pair_gradient(*two_answers(x)),
    "token_inner_products": lambda x: preferences.token_inner_products(*two_answers(x)),
    "dpo_loss": lambda x: preferences.dpo_loss(vector(x), vector(0.1), vector(0.0), vector(0.2)),
    "cpo_loss": lambda x: preferences.cpo_loss(vector(x - 2), vector(-2.0)),
    "dpop_loss": lambda x: preferences.dpop_loss(vector(x), vector(0.1), vector(0.0), vector(0.2)),
    "hinge_loss": lambda x: preferences.hinge_loss(vector(x), vector(0.1), vector(0.0), vector(0.2)),
    "demonstration_weights": lambda x: preferences.demonstration_weights(vector(x)),
    "f_matching_dual": lambda x: preferences.f_matching_dual(vector(x).softmax(-1), vector(0.0).flip(0).softmax(-1)),
    "implicit_reward": lambda x: preferences.implicit_reward(vector(x), vector(0.1)),
    "implicit_reward_sft_loss": lambda x: preferences.implicit_reward_sft_loss(vector(x), vector(0.1)),
    "logits_as_q": lambda x: preferences.logits_as_q((ROWS + x)[None], torch.tensor([[0, 1]])),
    "ipo_loss": lambda x: preferences.ipo_loss(vector(x), vector(0.1), vector(0.0), vector(0.2)),
    "kto_baseline": lambda x: preferences.kto_baseline(vector(x), vector(0.1)),
    "kto_loss": lambda x: preferences.kto_loss(vector(x), vector(0.1), vector(0.0), vector(0.2)),
    "orpo_loss": lambda x: preferences.orpo_loss(vector(x - 2), vector(-2.0), **LENGTHS),
    "rdpo_loss": lambda x: preferences.rdpo_loss(vector(x), vector(0.1), vector(0.0), vector(0.2), **LENGTHS),
    "rpo_loss": lambda x: preferences.rpo_loss(vector(x), vector(0.1), vector(0.0), vector(0.2)),
    "rrhf_loss": lambda x: preferences.rrhf_loss(vector(x - 2), vector(-2.0), **LENGTHS),
    "sft_loss": lambda x: preferences.sft_loss(vector(x)),
    "simpo_loss": lambda x: preferences.simpo_loss(vector(x - 2), vector(-2.0), **LENGTHS),
    "slic_loss": lambda x: preferences.slic_loss(vector(x - 2), vector(-2.0)),
    "sppo_loss": lambda x: preferences.sppo_loss(vector(x), vector(0.1), vector(0.0), vector(0.2)),
    "one_step_x0": lambda x: preferences.one_step_x0(ROWS + x, ROWS, torch.tensor([0.5, 1.0])),
    "paired_timesteps": lambda x: preferences.paired_timesteps(whole(torch.tensor([3.0, 980.0]) + x), gap=50),
    "uncertainty_kl": lambda x: preferences.uncertainty_kl(ROWS + x, ROWS.flip(0)),
    "uncertainty_weighted_loss": lambda x: preferences.uncertainty_weighted_loss(ROWS + x, ROWS.square()),
    "generalized_advantages": lambda x: preferences.generalized_advantages(vector(x), vector(0.0)),
    "kl_estimate": lambda x: preferences.kl_estimate(vector(x), vector(0.0)),
    "answer_logits": lambda x: preferences.answer_logits(language_model(x), preferences.collate_pairs(PAIRS)),
    "states_as_inputs": lambda x: preferences.states_as_inputs(
        language_model(0.0), preferences.collate_pairs(PAIRS), [torch.ones(5, 8) + x]
    ),
    "log_probabilities_from_states": lambda x: preferences.log_probabilities_from_states(
        preferences.FrozenTrunk(language_model(x), last=1).top(), PAIRS, [torch.ones(5, 8) + x]
    ),
    "pair_log_probabilities": lambda x: preferences.pair_log_probabilities(
        language_model(x), preferences.collate_pairs(PAIRS)
    ),
    "shares_prompt": lambda x: preferences.shares_prompt(language_model(x), PAIRS[0]),
    "with_reference": lambda x: preferences.with_reference(
        preferences.pair_log_probabilities(language_model(0.0), preferences.collate_pairs(PAIRS)),
        [(torch.tensor([-1.0 + x]), torch.tensor([-1.0, -2.0]))],
    ),
    "sequence_log_probability": lambda x: preferences.sequence_log_probability(
        (ROWS + x)[None], torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    ),
    "token_log_probabilities": lambda x: preferences.token_log_probabilities(ROWS + x, torch.tensor([0, 1])),
    "minimizability_gap": lambda x: bounds.minimizability_gap(vector(x).softmax(-1)[None], ROWS[:, None], tau=1.0),
    "noise_tolerance": lambda x: bounds.noise_tolerance(*classification(x), generator=torch.Generator().manual_seed(0)),
    "pac_bayes_bound": lambda x: vars(bounds.pac_bayes_bound(*classification(x))),
    "path_norm": lambda x: bounds.path_norm(classification(x, weight=True)[0], ROWS),
    "optimistic_entropic_step": lambda x: optim.optimistic_entropic_step(
        optim.FollowState.on_simplex(vector(0.0).softmax(-1)), vector(x)
    ),
    "optimistic_ftrl_step": lambda x: optim.optimistic_ftrl_step(
        optim.FollowState.at(vector(0.0)), vector(x), diameter=2.0
    ),
    "optimistic_newton_step": lambda x: optim.optimistic_newton_step(
        optim.NewtonState.at(vector(0.0), grad_bound=4.0, curvature=0.1), vector(x), grad_bound=4.0, curvature=0.1
    ),
    "optimistic_step": lambda x: optim.optimistic_step(optim.MirrorState.at(vector(0.0)), vector(x), diameter=2.0),
    "policy_error_bound": lambda x: constraints.policy_error_bound(
        fit_error=0.1 + x, lipschitz=2.0, expert_lipschitz=3.0, covering_radius=0.1
    ),
    "mix_advantages": lambda x: preferences.mix_advantages(ROWS + x, vector(0.0), weights=vector(0.0, 2)),
    "proxy_point": lambda x: preferences.proxy_point(ROWS + x, vector(0.0, 2)),
    "project_ball": lambda x: constraints.project_ball(vector(x)),
    "project_ball_in_metric": lambda x: optim.project_ball_in_metric(
        vector(x), torch.eye(4, dtype=torch.float64) + ROWS.T @ ROWS
    ),
    "project_simplex": lambda x: constraints.project_simplex(vector(x)),
    "project_topk_simplex": lambda x: transport.project_topk_simplex(vector(x), k=2),
    "quadratic_penalty": lambda x: constraints.quadratic_penalty(vector(x)),
    "semi_relaxed_partial_ot": lambda x: transport.semi_relaxed_partial_ot(ROWS + x, mass=0.5).plan,
    "sharpness": lambda x: bounds.sharpness(*regression(x), radius=0.1),
    "slope_violation": lambda x: constraints.slope_violation(ROWS, ROWS + x, lipschitz=0.5),
    "solve_over_field": lambda x: bounds.solve_over_field(
        whole(torch.eye(2)[None] + x), torch.ones(1, 2).long(), order=5
    ),
    "sparse_ot": lambda x: transport.sparse_ot(ROWS + x, k=2),
    "spectral_margin_bound": lambda x: vars(bounds.spectral_margin_bound(*classification(x))),
    "top_hessian_eigenvalue": lambda x: bounds.top_hessian_eigenvalue(*regression(x)),
    "twin_audit": lambda x: bounds.twin_audit(*classification(x), population=(ROWS, torch.tensor([1, 1]))),
    "uniform_failure_bound": lambda x: bounds.uniform_failure_bound(0.25 + x, low_loss=0.0, high_loss=0.5),
    "orthogonalize": lambda x: constraints.orthogonalize(ROWS + x),
    "rms_operator_norm": lambda x: constraints.rms_operator_norm(ROWS + x),
    "soft_cap_strength": lambda x: constraints.soft_cap_strength(1.0 + x, lr=0.1),
    "sketch_and_project": lambda x: constraints.sketch_and_project(torch.eye(4).double() + x, vector(0.0)),
    "certified_radius": lambda x: constraints.certified_radius(
        constraints.lipschitz_bound(regression(0.0)[0]), ROWS + x
    ),
    "lipschitz_bound": lambda x: constraints.lipschitz_bound(classification(x, weight=True)[0]),
}


def exported():
    return [
        name
        for room in ROOMS
        for name in importlib.import_module(f"minimand.{room}").__all__
        # A cached function is no function to inspect.
        if inspect.isroutine(inspect.unwrap(getattr(importlib.import_module(f"minimand.{room}"), name)))
    ]


# These read files, tokens and models, no numbers that could be NaN.
READERS = {
    "behaviour_data",
    "collate_pairs",
    "load_language_model",
    "load_policy",
    "make_environment",
    "read_minari",
    "read_pairs",
    "read_prices",
    "read_transitions",
    "tokenize_pairs",
    "train_only",
    "write_minari",
}


def test_every_function_has_a_row():
    assert set(exported()) - READERS == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_finite_numbers_is_finite(name):
    assert finite(FUNCTIONS[name](0.0))


@pytest.mark.untyped
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_refuses_nan(name):
    with pytest.raises((ValueError, TypeError), match=r"(?i)nan|finite|between|must"):
        FUNCTIONS[name](float("nan"))
