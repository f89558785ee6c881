r"""Reward ensembles: several reward models score answers conservatively, so that their errors are not exploited.

Members :math:`R_1, \dots, R_k` are trained on the same preferences and differ by chance alone. What is maximised is

.. math:: \text{mean: } \bar R = \tfrac1k \sum_i R_i, \qquad \text{worst case (WCO): } \min_i R_i, \qquad
          \text{uncertainty-weighted (UWO): } \bar R - \lambda\,\tfrac1k \sum_i (R_i - \bar R)^2.

A reward learnt from comparisons has no zero and no unit, but a minimum and a variance over members need both: members
are put on one scale first, mean 0 and standard deviation 1 on a reference batch.

Source: Coste, Anwar, Kirk and Krueger, "Reward Model Ensembles Help Mitigate Overoptimization", ICLR 2024, arXiv
2310.02743.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .. import checks
from ..reduction import Reduction, check_reduction, reduce
from ..training import shuffled_batches

Aggregation = Literal["mean", "worst-case", "uncertainty-weighted"]

_AGGREGATIONS = ("mean", "worst-case", "uncertainty-weighted")


def aggregate_rewards(
    scores: Float[Tensor, "members *batch"],
    *,
    method: Aggregation = "worst-case",
    penalty: float = 0.5,
    unbiased: bool = False,
) -> Float[Tensor, "*batch"]:
    r"""Compute one reward from the scores of several reward models.

    ``"mean"`` :math:`\bar R`; ``"worst-case"`` :math:`\min_i R_i`; ``"uncertainty-weighted"``
    :math:`\bar R - \lambda \mathrm{Var}_i(R_i)`. Gradients pass through: to the worst member only (shared evenly where
    several are), or to member i with :math:`\frac1k - \frac{2\lambda}{k}(R_i - \bar R)`.

    Args:
        scores: One row a member, on one scale (see :meth:`RewardEnsemble.fit_scale`): the variance and the minimum
            change if a member is shifted.
        method: How members add up.
        penalty: lambda, at least 0, in units of one over a score; only ``"uncertainty-weighted"`` reads it. The
            official code has 0.5 for best-of-n and 0.1 for PPO.
        unbiased: Whether the variance divides by k - 1 in place of the paper's k. The official code does so in PPO,
            which at five members is a penalty 1.25 times as large.

    Returns:
        The rewards, without the dimension of members.

    Raises:
        TypeError: If scores are no floating-point tensor.
        ValueError: If a score is not finite, there is none, a setting is out of range, or the variance of a single
            member is asked for.

    Example:
        >>> scores = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
        >>> aggregate_rewards(scores), aggregate_rewards(scores, method="uncertainty-weighted")
        (tensor([1., 0.]), tensor([1.5000, 0.0000]))

    Source:
        Coste et al. 2024, arXiv 2310.02743, section 3.
    """
    _check_aggregation(method, penalty)
    _check_scores(scores)
    if method == "worst-case":
        return scores.amin(0)
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # From the smallest upwards: members that agree have exactly their common score as mean, and variance zero.
    low = exact.detach().amin(0)
    mean = low + (exact - low).mean(0)
    if method == "mean":
        return mean.to(scores.dtype)
    _check_several(len(scores), "the variance over members")
    variance = (exact - mean).square().sum(0) / (len(scores) - unbiased)
    return (mean - penalty * variance).to(scores.dtype)


def pairwise_reward_loss(
    chosen: Float[Tensor, "*batch"],
    rejected: Float[Tensor, "*batch"],
    *,
    score_decay: float = 1e-3,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*batch"]:
    r"""Compute the loss of a reward model on each pair: Bradley and Terry's likelihood, and a decay of the scores.

    :math:`-(1 - \epsilon) \log\sigma(r_w - r_l) - \epsilon \log\sigma(r_l - r_w) + \frac{d}{2} (r_w^2 + r_l^2)`. The
    likelihood leaves a common shift of both scores free; the decay keeps them around zero.

    Args:
        chosen: Scores of the chosen answers.
        rejected: Scores of the rejected ones, of the same shape.
        score_decay: d, at least 0; 1e-3 is the official code's.
        label_smoothing: epsilon, the share of pairs assumed to be labelled the wrong way, in [0, 0.5).

    Returns:
        The loss of each pair.

    Raises:
        TypeError: If a score is no floating-point number.
        ValueError: If shapes differ, a score is not finite, or a setting is out of range.

    Example:
        >>> pairwise_reward_loss(torch.tensor([2.0]), torch.tensor([0.0]), score_decay=0.0)
        tensor([0.1269])

    Source:
        Coste et al. 2024, arXiv 2310.02743; the likelihood is Bradley and Terry's of 1952.
    """
    checks.non_negative(score_decay, "score_decay")
    checks.between(label_smoothing, "label_smoothing", 0.0, 0.5, high_open=True)
    for value, name in ((chosen, "chosen"), (rejected, "rejected")):
        checks.floating(value, name)
        checks.not_empty(value, name)
        checks.finite(value.detach(), name)
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected must have the shape of chosen, {tuple(chosen.shape)}, got {tuple(rejected.shape)}")
    return _pair_losses(chosen, rejected, score_decay, label_smoothing)


class PairwiseRewardLoss(nn.Module):
    r"""The loss that a reward model is trained with: logistic regression on the difference of two scores.

    Args:
        score_decay: Weight of half the squared scores, at least 0; 1e-3 is the official code's. It settles the shift
            that comparisons leave free.
        label_smoothing: The share of pairs assumed to be labelled the wrong way, in [0, 0.5).
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> loss = PairwiseRewardLoss()
        >>> loss(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]))  # (0.1269 + 0.002 + log 2 + 0.001) / 2
        tensor(0.4115)

    Source:
        Coste et al. 2024, arXiv 2310.02743.
    """

    def __init__(
        self, score_decay: float = 1e-3, *, label_smoothing: float = 0.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        checks.non_negative(score_decay, "score_decay")
        checks.between(label_smoothing, "label_smoothing", 0.0, 0.5, high_open=True)
        check_reduction(reduction)
        self.score_decay = score_decay
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]) -> Float[Tensor, "*reduced"]:
        """Compute the loss of a batch of pairs from the scores of their answers."""
        losses = pairwise_reward_loss(
            chosen, rejected, score_decay=self.score_decay, label_smoothing=self.label_smoothing
        )
        return reduce(losses, self.reduction)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"score_decay={self.score_decay}, label_smoothing={self.label_smoothing}"


class RewardHeads(nn.Module):
    """Several multi-layer perceptrons from features to a score, held and computed as one.

    Each layer is one batched product over all members. A member's first weights follow from the seed and its number
    alone, so the first heads of a larger ensemble are those of a smaller one. They are drawn as those of torch's
    ``nn.Linear``.

    Args:
        features: Length of a feature vector.
        num_members: How many heads; 5 as in the paper.
        hidden: Widths of the hidden layers, with ReLU after each; none for linear heads.
        seed: Decides the first weights.

    Example:
        >>> heads = RewardHeads(8, num_members=3)
        >>> heads(torch.zeros(4, 8)).shape
        torch.Size([3, 4])

    Source:
        Coste et al. 2024, arXiv 2310.02743, section 4: members that differ by their seeds.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, features: int, *, num_members: int = 5, hidden: Sequence[int] = (64, 64), seed: int = 0) -> None:
        super().__init__()
        sizes = (features, *hidden, 1)
        if min(sizes) < 1:
            raise ValueError(f"features and hidden widths must be at least 1, got {features} and {tuple(hidden)}")
        if num_members < 1:
            raise ValueError(f"num_members must be at least 1, got {num_members}")
        self.num_members = num_members
        self.weights = nn.ParameterList(torch.empty(num_members, a, b) for a, b in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(torch.empty(num_members, 1, size) for size in sizes[1:])
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_scale", torch.ones(features))
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw all weights anew."""
        for member in range(self.num_members):
            generator = _generator(seed, member, "weights")
            for weight, bias in zip(self.weights, self.biases, strict=True):
                bound = weight.shape[1] ** -0.5
                # Drawn on the CPU: the same numbers whatever device the heads are on.
                for parameter in (weight[member], bias[member]):
                    drawn = torch.empty(parameter.shape, dtype=torch.float64)
                    parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    @torch.no_grad()
    def fit_features(self, features: Float[Tensor, "rows features"]) -> None:
        """Scale each feature by its mean and standard deviation over these rows; a constant one is only centred."""
        self._check(features)
        mean, deviation, constant = _moments(features, 0)
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_(torch.where(constant, torch.ones_like(deviation), deviation))

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "members *batch"]:
        """Score each feature vector by all members."""
        self._check(features)
        rows = self._scaled(features).reshape(1, -1, features.shape[-1])
        return self._score(rows.expand(self.num_members, -1, -1)).reshape(self.num_members, *features.shape[:-1])

    def each(self, features: Float[Tensor, "members batch features"]) -> Float[Tensor, "members batch"]:
        """Score feature vectors of its own by each member: row i of ``features`` by member i."""
        self._check(features)
        if features.dim() != 3 or len(features) != self.num_members:
            raise ValueError(
                f"features must have shape (members, batch, features) with {self.num_members} members, "
                f"got {tuple(features.shape)}"
            )
        return self._score(self._scaled(features))

    def member(self, index: int) -> nn.Sequential:
        """Copy one head into a plain module, which scores ``(batch, features)`` as ``(batch, 1)``."""
        layers: list[nn.Module] = []
        with torch.no_grad():
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                shift, factor = bias[index, 0], weight[index]
                if layer == 0:
                    factor = factor / self.feature_scale[:, None]
                    shift = shift - self.feature_mean @ factor
                linear = nn.Linear(len(factor), factor.shape[1]).to(factor)
                linear.weight.copy_(factor.T)
                linear.bias.copy_(shift)
                layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def extra_repr(self) -> str:
        """Say the sizes."""
        sizes = [self.weights[0].shape[1], *(weight.shape[2] for weight in self.weights)]
        return f"{' -> '.join(map(str, sizes))}, num_members={self.num_members}"

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self.feature_mean) / self.feature_scale

    def _score(self, rows: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rows = torch.baddbmm(bias, rows, weight)
            if layer < last:
                rows = rows.relu_()
        return rows.squeeze(-1)

    def _check(self, features: Tensor) -> None:
        checks.floating(features, "features")
        width = len(self.feature_mean)
        if features.dim() < 2 or features.shape[-1] != width:
            raise ValueError(f"features must have shape (*batch, {width}), got {tuple(features.shape)}")
        checks.not_empty(features, "features")
        checks.finite(features.detach(), "features")


def fit_reward_heads(
    heads: RewardHeads,
    chosen: Float[Tensor, "pairs features"],
    rejected: Float[Tensor, "pairs features"],
    *,
    loss: PairwiseRewardLoss | None = None,
    epochs: int = 60,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    bootstrap: bool = False,
    seed: int = 0,
) -> Float[Tensor, "epochs members"]:
    """Train all heads in place, at once, on preferences between feature vectors.

    Features may be anything frozen, such as a language model's last hidden state at the end of an answer; they are
    scaled by the heads (see :meth:`RewardHeads.fit_features`). AdamW takes each step for all members together, from
    batches of their own: every head ends where it would have ended alone, up to rounding.

    Args:
        heads: What is trained, from the weights that it has; its device and dtype are kept.
        chosen: Features of the chosen answers.
        rejected: Features of the rejected ones, pair by pair.
        loss: The loss of a pair; None for :class:`PairwiseRewardLoss` with its defaults. Its ``reduction`` does not
            count: each member minimises its mean.
        epochs: Passes over the pairs. This, the batch size and the learning rate suit thousands of pairs and small
            heads; they are not the paper's, which trains whole language models.
        batch_size: Pairs a step and member; an incomplete last batch of an epoch is left out.
        lr: AdamW's learning rate, constant.
        weight_decay: AdamW's.
        bootstrap: Whether each member has a resample of the pairs, drawn with replacement, in place of all of them.
            In the paper members share their data.
        seed: Decides the order of the pairs, member by member, and the resamples.

    Returns:
        The mean loss of each epoch and member.

    Raises:
        TypeError: If features are no floating-point tensors.
        ValueError: If shapes differ, there are no pairs, a feature is not finite, a setting is out of range, or
            training diverges.

    Example:
        >>> better, worse = torch.randn(200, 4) + 0.5, torch.randn(200, 4) - 0.5
        >>> heads = RewardHeads(4, hidden=())
        >>> history = fit_reward_heads(heads, better, worse, epochs=20, lr=1e-2)
        >>> reward = RewardEnsemble(heads).fit_scale(torch.cat([better, worse]))
        >>> (reward(better) > reward(worse)).float().mean() > 0.8  # preference accuracy
        tensor(True)

    Source:
        Coste et al. 2024, arXiv 2310.02743, section 4.
    """
    for value, name in ((chosen, "chosen"), (rejected, "rejected")):
        checks.floating(value, name)
        if value.dim() != 2 or value.shape != chosen.shape:
            raise ValueError(
                f"chosen and rejected must both have shape (pairs, features), got {tuple(chosen.shape)} "
                f"and {tuple(rejected.shape)}"
            )
        checks.not_empty(value, name)
        checks.finite(value, name)
    for number, name in ((epochs, "epochs"), (batch_size, "batch_size")):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    checks.positive(lr, "lr")
    checks.non_negative(weight_decay, "weight_decay")
    loss = PairwiseRewardLoss() if loss is None else loss
    weight = heads.weights[0]
    pairs = torch.stack([chosen, rejected], 1).detach().to(weight)
    heads.fit_features(pairs.flatten(0, 1))
    pairs = heads._scaled(pairs).flatten(1)
    samples, members = len(pairs), heads.num_members
    generators = [_generator(seed, member, "order") for member in range(members)]
    resamples = [torch.randint(samples, (samples,), generator=one) if bootstrap else None for one in generators]
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    # Every step's rows are gathered into the same memory.
    drawn = pairs.new_empty(members * min(batch_size, samples), pairs.shape[1])
    history = []
    for _ in range(epochs):
        orders = [shuffled_batches(samples, batch_size, generator) for generator in generators]
        index = torch.stack([o if own is None else own[o] for o, own in zip(orders, resamples, strict=True)], 1)
        total = weight.new_zeros(members)
        for batch in index.to(weight.device):
            torch.index_select(pairs, 0, batch.flatten(), out=drawn)
            scores = heads._score(drawn.view(members, -1, chosen.shape[1])).unflatten(1, (-1, 2))
            means = _pair_losses(scores[..., 0], scores[..., 1], loss.score_decay, loss.label_smoothing).mean(1)
            optimizer.zero_grad()
            # Members share no parameter, so the gradient of the sum is each one's own.
            means.sum().backward()
            optimizer.step()
            total += means.detach()
        history.append(total / len(index))
    losses = torch.stack(history)
    checks.require(torch.isfinite(losses), lambda: f"lr={lr} is too large: the loss did not stay finite")
    return losses


class RewardEnsemble(nn.Module):
    """A conservative reward: members on one scale, and their mean, worst score or mean less a share of the variance.

    Members may have any shift and unit, which comparisons do not fix: ``fit_scale`` settles both on a reference batch,
    such as answers of the policy before training. It must be called once, or ``standardize`` be switched off for
    members that already share a scale.

    Members that err together, from one backbone or one bias in the data, still err together here; keep the KL penalty.

    Args:
        members: A module that maps its inputs to scores ``(members, *batch)`` and says its ``num_members``, as
            :class:`RewardHeads`; or a sequence of modules that each map them to scores ``(*batch,)``.
        method: ``"mean"``, ``"worst-case"`` (the paper's WCO) or ``"uncertainty-weighted"`` (its UWO).
        penalty: lambda of UWO, at least 0; 0.5 is the official code's for best-of-n, which has 0.1 for PPO. Scores of
            unit 1 give it its meaning: with every score doubled the penalty counts four times.
        unbiased: Whether the variance divides by k - 1 in place of k.
        standardize: Whether members are scaled by ``fit_scale``.

    Attributes:
        center: Mean of each member's scores over the reference, ``(members,)``.
        spread: Their standard deviation, ``(members,)``.

    Example:
        >>> reward = RewardEnsemble(RewardHeads(8), method="uncertainty-weighted", penalty=0.1)
        >>> answers = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> rewards = reward.fit_scale(answers)(answers)
        >>> rewards.shape, bool((rewards <= reward.scores(answers).mean(0)).all())
        (torch.Size([100]), True)

    Source:
        Coste et al. 2024, arXiv 2310.02743.
    """

    center: Tensor
    spread: Tensor
    is_scaled: Tensor

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        *,
        method: Aggregation = "worst-case",
        penalty: float = 0.5,
        unbiased: bool = False,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        _check_aggregation(method, penalty)
        self.members = members if isinstance(members, nn.Module) else nn.ModuleList(members)
        several = isinstance(self.members, nn.ModuleList)
        self.num_members = len(self.members) if several else getattr(self.members, "num_members", 0)  # type: ignore[arg-type]
        if self.num_members < 1:
            raise ValueError("members must be a module with num_members of at least 1, or a sequence of modules")
        if method == "uncertainty-weighted":
            _check_several(self.num_members, "the variance over members")
        self.method: Aggregation = method
        self.penalty = penalty
        self.unbiased = unbiased
        self.standardize = standardize
        self.register_buffer("center", torch.zeros(self.num_members))
        self.register_buffer("spread", torch.ones(self.num_members))
        self.register_buffer("is_scaled", torch.tensor(False))

    @torch.no_grad()
    def fit_scale(self, *inputs: Any, **named: Any) -> RewardEnsemble:
        """Put members on one scale: mean 0 and standard deviation 1 over these inputs. Returns the ensemble.

        Raises:
            ValueError: If a member gives all of them the same score, or one that is not finite.
        """
        scores = self._raw(*inputs, **named).flatten(1)
        mean, deviation, constant = _moments(scores, 1)
        checks.require(
            ~constant,
            lambda: f"member {int(constant.int().argmax())} scores all reference inputs alike",
        )
        self.center.copy_(mean)
        self.spread.copy_(deviation)
        self.is_scaled.fill_(True)
        return self

    def scores(self, *inputs: Any, **named: Any) -> Float[Tensor, "members *batch"]:
        """Score by each member, on the common scale."""
        scores = self._raw(*inputs, **named)
        if not self.standardize:
            return scores
        checks.require(self.is_scaled, lambda: "members have no common scale: call fit_scale on reference inputs first")
        shape = (-1, *[1] * (scores.dim() - 1))
        return (scores - self.center.view(shape)) / self.spread.view(shape)

    def forward(self, *inputs: Any, **named: Any) -> Float[Tensor, "*batch"]:
        """Compute the rewards; inputs are the members'."""
        return aggregate_rewards(
            self.scores(*inputs, **named), method=self.method, penalty=self.penalty, unbiased=self.unbiased
        )

    def disagreement(self, *inputs: Any, **named: Any) -> Float[Tensor, "*batch"]:
        """Compute the standard deviation over members, large where they were not taught; at least two members."""
        _check_several(self.num_members, "disagreement")
        return self.scores(*inputs, **named).std(0, correction=int(self.unbiased))

    def reward_function(self, encode: Callable[[Sequence[Any], Sequence[Any]], Any]) -> Callable[..., list[float]]:
        """Wrap the ensemble into one of TRL's ``reward_funcs``.

        Args:
            encode: From prompts and completions, as the trainer has them, to what members take; for
                :class:`RewardHeads`, one feature vector an answer.

        Returns:
            A plain function of ``prompts``, ``completions`` and whatever else the trainer passes, to one number an
            answer. It computes without gradient, in evaluation mode.
        """

        def reward_ensemble(prompts: Sequence[Any], completions: Sequence[Any], **others: Any) -> list[float]:
            training = self.training
            self.eval()
            try:
                with torch.no_grad():
                    return self(encode(prompts, completions)).float().tolist()
            finally:
                self.train(training)

        return reward_ensemble

    def extra_repr(self) -> str:
        """Say the settings."""
        penalty = f", penalty={self.penalty}" if self.method == "uncertainty-weighted" else ""
        return f"num_members={self.num_members}, method={self.method!r}{penalty}, standardize={self.standardize}"

    def _raw(self, *inputs: Any, **named: Any) -> Tensor:
        if isinstance(self.members, nn.ModuleList):
            scores = torch.stack([member(*inputs, **named) for member in self.members])
        else:
            scores = self.members(*inputs, **named)
        _check_scores(scores)
        if len(scores) != self.num_members:
            raise ValueError(f"members must give scores ({self.num_members}, *batch), got {tuple(scores.shape)}")
        return scores


def _generator(seed: int, member: int, purpose: str) -> torch.Generator:
    """Return a stream of random numbers that follows from these three, and from nothing else."""
    digest = hashlib.blake2b(f"{seed}/{member}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _pair_losses(chosen: Tensor, rejected: Tensor, score_decay: float, label_smoothing: float) -> Tensor:
    margin = chosen - rejected
    losses = -functional.logsigmoid(margin)
    if label_smoothing:
        # -log sigma(-m) = -log sigma(m) + m, so the smoothed loss needs one logarithm, not two.
        losses = losses + label_smoothing * margin
    return losses + score_decay / 2 * (chosen.square() + rejected.square())


def _moments(values: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, standard deviation (of the batch, not its estimate), and where the values do not vary."""
    exact = values.to(torch.promote_types(values.dtype, torch.float32))
    mean, deviation = exact.mean(dim), exact.std(dim, correction=0)
    # Equal numbers may differ from their mean in the last digits.
    rounding = 10 * torch.finfo(values.dtype).eps * exact.abs().amax(dim)
    return mean, deviation, deviation <= rounding


def _check_aggregation(method: str, penalty: float) -> None:
    checks.one_of(method, "method", _AGGREGATIONS)
    checks.non_negative(penalty, "penalty")


def _check_several(members: int, what: str) -> None:
    if members < 2:
        raise ValueError(f"{what} must be taken over at least two members, got {members}")


def _check_scores(scores: Tensor) -> None:
    checks.floating(scores, "scores")
    if scores.dim() < 1:
        raise ValueError("scores must have shape (members, *batch), got a scalar")
    checks.not_empty(scores, "scores")
    checks.finite(scores.detach(), "scores")
