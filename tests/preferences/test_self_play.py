"""Rounds of self-play and the tournament: what is drawn, compared, remembered and resumed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimand.preferences import INPOLoss, PreferenceGame, SelfPlayRounds, tournament

F64 = torch.float64
BEATS = torch.tensor(
    [[0.5, 0.8, 0.3, 0.6], [0.2, 0.5, 0.9, 0.4], [0.7, 0.1, 0.5, 0.7], [0.4, 0.6, 0.3, 0.5]], dtype=F64
)


def by_number(prompts, first, second):
    return torch.where(first == second, 0.5, (first > second).double())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), half=st.integers(1, 9))
def test_the_tournament_finds_the_best_and_the_worst_by_the_fewest_comparisons_that_suffice(seed, half):
    n = 2 * half
    answers = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(seed + k)) for k in range(7)])
    asked = []

    def compare(prompts, first, second):
        asked.append(len(prompts))
        assert (answers[prompts.long()] == first[:, None]).any(1).all()
        return by_number(prompts, first, second)

    best, worst = tournament(torch.arange(7), answers, compare)
    torch.testing.assert_close(best, answers.argmax(1))
    torch.testing.assert_close(worst, answers.argmin(1))
    assert sum(asked) == 7 * (3 * half - 2)


def test_the_tournament_of_eight_takes_ten_comparisons_in_five_calls():
    asked = []

    def compare(prompts, first, second):
        asked.append(len(prompts))
        return by_number(prompts, first, second)

    tournament(torch.zeros(1), torch.arange(8)[None], compare)
    assert asked == [4, 2, 1, 2, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), half=st.integers(1, 6))
def test_best_and_worst_are_never_the_same_answer_even_where_preferences_run_in_circles(seed, half):
    generator = torch.Generator().manual_seed(seed)
    answers = torch.arange(2 * half).expand(5, -1)
    best, worst = tournament(
        torch.zeros(5), answers, lambda _, first, second: torch.rand(len(first), generator=generator)
    )
    assert (best != worst).all()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("answers", "compare", "message"),
    [
        (torch.zeros(2, 3), by_number, r"answers must have shape \(2, an even number"),
        (torch.zeros(2, 0), by_number, "answers must have shape"),
        (torch.zeros(3, 4), by_number, "answers must have shape"),
        (torch.zeros(2, 4), lambda *_: torch.full((4,), float("nan")), "probabilities"),
        (torch.zeros(2, 4), lambda *_: torch.full((4,), 1.5), "probabilities"),
        (torch.zeros(2, 4), lambda *_: torch.zeros(3), r"one number a row, \(4,\)"),
    ],
)
def test_a_tournament_refuses_what_it_cannot_play(answers, compare, message):
    with pytest.raises(ValueError, match=message):
        tournament(torch.zeros(2), answers, compare)


class Policy(nn.Module):
    """A frozen base, trainable logits for each prompt, a buffer, and dropout."""

    def __init__(self, prompts=3, answers=4):
        super().__init__()
        self.base = nn.Embedding(prompts, answers).double().requires_grad_(False)
        self.logits = nn.Embedding(prompts, answers).double()
        self.logits.weight.data.zero_()
        self.register_buffer("calls", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, prompts):
        self.calls += 1
        return self.drop(self.base(prompts)) + self.logits(prompts)


def log_probability(policy, prompts, answers):
    return policy(prompts).log_softmax(-1).gather(-1, answers[:, None]).squeeze(-1)


def sampler(generator):
    def sample(policy, prompts, n):
        return torch.multinomial(policy(prompts).softmax(-1), n, replacement=True, generator=generator)

    return sample


def rounds_of(policy, *, seed=0, each=20, compare=None, **settings):
    return SelfPlayRounds(
        policy,
        prompts=torch.arange(3).repeat_interleave(each),
        sample=sampler(torch.Generator().manual_seed(seed)),
        log_probability=log_probability,
        compare=compare or (lambda prompts, first, second: BEATS[first, second]),
        **settings,
    )


def policy(seed=0):
    torch.manual_seed(seed)
    return Policy()


def train(rounds, pairs, optimizer, steps=5, loss=None):
    loss = loss or INPOLoss(0.5, tau=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*rounds.log_probabilities(pairs), **pairs.fixed()).backward()
        optimizer.step()


def logits(model, prompts):
    return (model.base.weight + model.logits.weight)[prompts].log_softmax(-1)


def test_the_pairs_of_a_round_carry_the_oracles_verdict_and_the_exact_log_probabilities():
    model = policy()
    reference = copy.deepcopy(model)
    rounds = rounds_of(model, num_answers=4)
    optimizer = torch.optim.SGD(model.logits.parameters(), lr=1.0)
    for number, pairs in enumerate(rounds):
        last = copy.deepcopy(model)
        assert len(pairs) <= 3 * 20 * 2
        assert (pairs.chosen != pairs.rejected).all()
        torch.testing.assert_close(pairs.preference, BEATS[pairs.chosen, pairs.rejected])
        assert (pairs.preference >= 0.5).all()
        for which, model_of in (("ref", reference), ("prev", last)):
            for name in ("chosen", "rejected"):
                expected = logits(model_of, pairs.prompts).gather(1, getattr(pairs, name)[:, None])[:, 0]
                torch.testing.assert_close(getattr(pairs, f"{which}_logp_{name}"), expected, rtol=0, atol=1e-12)
        assert torch.equal(pairs.ref_logp_chosen, pairs.prev_logp_chosen) == (number == 0)
        assert not any(value.requires_grad for value in vars(pairs).values())
        train(rounds, pairs, optimizer)
    assert rounds.finished == 3
    assert number == 2
    assert list(rounds) == []


def test_answers_of_a_pair_are_independent_draws_from_the_policy():
    model = policy(1)
    pairs = next(iter(rounds_of(model, each=20_000)))
    expected = logits(model, torch.arange(3)).exp()
    for prompt in range(3):
        p = expected[prompt]
        joint = p[:, None] * p * (1 - torch.eye(4, dtype=F64))
        unordered = (joint + joint.T).triu(1)
        here = pairs.prompts == prompt
        low, high = torch.minimum(pairs.chosen, pairs.rejected)[here], torch.maximum(pairs.chosen, pairs.rejected)[here]
        counts = torch.zeros(4, 4, dtype=F64).index_put((low, high), torch.ones(len(low), dtype=F64), accumulate=True)
        torch.testing.assert_close(counts / 20_000, unordered, rtol=0, atol=0.02)


def test_a_drawn_label_has_a_preference_of_one_and_a_tie_of_one_half():
    pairs = next(iter(rounds_of(policy(), compare=lambda _, first, second: (first < second).double())))
    assert (pairs.chosen < pairs.rejected).all()
    assert (pairs.preference == 1).all()
    pairs = next(iter(rounds_of(policy(), compare=lambda _, first, second: torch.full((len(first),), 0.5))))
    assert (pairs.preference == 0.5).all()


def test_the_oracle_is_asked_once_a_pair_or_once_a_match_and_never_about_twins():
    asked = []

    def compare(prompts, first, second):
        asked.append(len(prompts))
        return BEATS[first, second]

    rounds = rounds_of(policy(), num_answers=2, compare=compare)
    pairs = next(iter(rounds))
    assert sum(asked) == rounds.comparisons == len(pairs) < 60
    asked.clear()
    rounds = rounds_of(policy(), num_answers=8, pairing="extremes", compare=compare)
    pairs = next(iter(rounds))
    assert sum(asked) == rounds.comparisons == 60 * 10
    assert len(pairs) <= 60
    assert (pairs.preference == 1).all()


def test_extremes_are_the_winner_and_the_loser_of_the_tournament():
    pairs = next(iter(rounds_of(policy(), num_answers=6, pairing="extremes", compare=by_number)))
    drawn = sampler(torch.Generator().manual_seed(0))(policy().eval(), torch.arange(3).repeat_interleave(20), 6)
    distinct = drawn.amax(1) != drawn.amin(1)
    torch.testing.assert_close(pairs.chosen, drawn.amax(1)[distinct])
    torch.testing.assert_close(pairs.rejected, drawn.amin(1)[distinct])


def test_dropout_is_off_as_a_round_begins_and_every_module_gets_its_own_mode_back():
    model = policy()
    model.train()
    model.base.eval()
    rounds = rounds_of(model)
    pairs = next(iter(rounds))
    assert model.training
    assert model.drop.training
    assert not model.base.training
    expected = logits(model, pairs.prompts).gather(1, pairs.chosen[:, None])[:, 0]
    torch.testing.assert_close(pairs.prev_logp_chosen, expected, rtol=0, atol=1e-12)


def test_a_round_leaves_the_weights_where_they_are_even_if_the_oracle_fails():
    model = policy()
    rounds = rounds_of(model)
    model.logits.weight.data.fill_(0.3)
    before = {name: value.clone() for name, value in model.named_parameters()}
    storage = model.logits.weight.data_ptr()

    def fails(policy, prompts, answers):
        if torch.equal(policy.logits.weight, torch.zeros_like(policy.logits.weight)):
            raise RuntimeError("no reference today")
        return log_probability(policy, prompts, answers)

    rounds.log_probability = fails
    with pytest.raises(RuntimeError, match="no reference today"):
        next(iter(rounds))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert model.logits.weight.data_ptr() == storage


def test_only_what_is_trained_and_buffers_are_copied():
    rounds = rounds_of(policy())
    assert set(rounds.state_dict()["reference"]) == {"logits.weight", "calls"}


def test_a_run_that_was_stopped_and_resumed_ends_where_one_that_was_not_ends(tmp_path):
    def run(interrupt):
        model = policy().eval()
        generator = torch.Generator().manual_seed(5)
        rounds = rounds_of(model, num_answers=4)
        rounds.sample = sampler(generator)
        optimizer = torch.optim.Adam(model.logits.parameters(), lr=0.1)
        for pairs in rounds:
            train(rounds, pairs, optimizer)
            if interrupt and rounds.finished == 1:
                break
            train(rounds, pairs, optimizer)
        if interrupt:
            states = [model.state_dict(), optimizer.state_dict(), rounds.state_dict(), generator.get_state()]
            torch.save(states, tmp_path / "state.pt")
            first = rounds.current
            states = torch.load(tmp_path / "state.pt", weights_only=True)
            model = policy(7).eval()
            model.load_state_dict(states[0])
            optimizer = torch.optim.Adam(model.logits.parameters(), lr=0.1)
            optimizer.load_state_dict(states[1])
            rounds = rounds_of(model, num_answers=4)
            rounds.load_state_dict(states[2])
            rounds.sample = sampler(torch.Generator().set_state(states[3]))
            for pairs in rounds:
                if rounds.finished == 1:
                    assert all(torch.equal(value, vars(first)[name]) for name, value in vars(pairs).items())
                else:
                    train(rounds, pairs, optimizer)
                train(rounds, pairs, optimizer)
        return model.logits.weight, rounds.comparisons

    (whole, asked), (parts, asked_in_parts) = run(False), run(True)
    assert torch.equal(whole, parts)
    assert asked == asked_in_parts


def test_rewinding_sets_the_policy_back_to_where_the_round_began():
    model = policy()
    rounds = rounds_of(model)
    optimizer = torch.optim.SGD(model.logits.parameters(), lr=1.0)
    starts = []
    for pairs in rounds:
        starts.append(model.logits.weight.detach().clone())
        train(rounds, pairs, optimizer)
        if rounds.finished == 1:
            moved = model.logits.weight.detach().clone()
            rounds.rewind()
            assert torch.equal(model.logits.weight, starts[1])
            assert not torch.equal(moved, starts[1])
    assert not torch.equal(starts[1], starts[0])


def test_chunks_change_nothing():
    whole = next(iter(rounds_of(policy(), num_answers=4)))
    drawn = sampler(torch.Generator().manual_seed(0))(policy().eval(), torch.arange(3).repeat_interleave(20), 4)
    rounds = rounds_of(policy(), num_answers=4, batch_size=7)
    sizes = []

    def sample(model, prompts, n):
        sizes.append(len(prompts))
        start = sum(sizes) - len(prompts)
        return drawn[start : start + len(prompts)]

    rounds.sample = sample
    parts = next(iter(rounds))
    assert max(sizes) == 7
    for name, value in vars(parts).items():
        torch.testing.assert_close(value, vars(whole)[name])


def test_batches_hold_every_pair_once_in_an_order_that_follows_from_the_generator():
    pairs = next(iter(rounds_of(policy())))
    generator = torch.Generator().manual_seed(3)
    batches = list(pairs.batches(16, generator=generator))
    assert [len(batch) for batch in batches[:-1]] == [16] * (len(batches) - 1)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(3))
    for name, value in vars(pairs).items():
        torch.testing.assert_close(torch.cat([vars(batch)[name] for batch in batches]), value[order])


def test_answers_may_be_rows_of_tokens_and_prompts_may_change_with_the_round():
    model = nn.Embedding(6, 4).double()

    def sample(policy, prompts, n):
        weights = policy(prompts).softmax(-1)
        return torch.multinomial(weights, 2 * n, replacement=True).view(len(prompts), n, 2)

    def scores(policy, prompts, answers):
        return policy(prompts).log_softmax(-1).gather(1, answers).sum(1)

    rounds = SelfPlayRounds(
        model,
        prompts=lambda number: torch.arange(2 * number, 2 * number + 2).repeat(5),
        sample=sample,
        log_probability=scores,
        compare=lambda _, first, second: torch.sigmoid((first - second).sum(1).double()),
    )
    for number, pairs in enumerate(rounds):
        assert set(pairs.prompts.tolist()) <= {2 * number, 2 * number + 1}
        assert pairs.chosen.shape == (len(pairs), 2)
        assert (pairs.chosen.sum(1) >= pairs.rejected.sum(1)).all()
        assert (pairs.chosen != pairs.rejected).any(1).all()
        expected = scores(model, pairs.prompts, pairs.rejected)
        torch.testing.assert_close(rounds.log_probabilities(pairs)[1], expected)


def test_inpo_in_these_rounds_reaches_the_nash_policy():
    model = policy(2).eval()
    game = PreferenceGame(BEATS.expand(3, 4, 4), logits(model, torch.arange(3)).detach(), tau=0.2)
    rounds = rounds_of(model, each=400, num_rounds=25)
    optimizer = torch.optim.Adam(model.logits.parameters(), lr=0.05)
    before = game.exploitability(game.log_reference).mean()
    for pairs in rounds:
        train(rounds, pairs, optimizer, steps=25, loss=INPOLoss(1.0, tau=0.2))
    after = game.exploitability(logits(model, torch.arange(3)).detach()).mean()
    assert float(before) > 0.01
    assert float(after) < 0.05 * float(before)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_answers": 3}, "num_answers must be an even number"),
        ({"num_answers": 0}, "num_answers must be an even number"),
        ({"num_rounds": 0}, "num_rounds must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"pairing": "all"}, "pairing must be one of"),
    ],
)
def test_bad_settings_are_refused_by_name(settings_, message):
    with pytest.raises(ValueError, match=message):
        rounds_of(policy(), **settings_)


@pytest.mark.untyped
def test_what_the_callables_return_is_checked():
    def rounds(**replaced):
        made = rounds_of(policy())
        for name, value in replaced.items():
            setattr(made, name, value)
        return iter(made)

    with pytest.raises(ValueError, match=r"answers must have shape \(60, 2"):
        next(rounds(sample=lambda policy, prompts, n: torch.zeros(len(prompts), 4).long()))
    with pytest.raises(ValueError, match="both answers of every pair are the same"):
        next(rounds(sample=lambda policy, prompts, n: torch.zeros(len(prompts), n).long()))
    with pytest.raises(ValueError, match="compare must return probabilities"):
        next(rounds(compare=lambda prompts, first, second: torch.full((len(first),), 2.0)))
    with pytest.raises(ValueError, match="log_probability must return one number a row"):
        next(rounds(log_probability=lambda policy, prompts, answers: torch.zeros(2)))
    with pytest.raises(ValueError, match="prompts is empty"):
        next(rounds(prompts=torch.zeros(0).long()))
    with pytest.raises(ValueError, match="nothing to train"):
        rounds_of(policy().requires_grad_(False))
    made = rounds_of(policy())
    with pytest.raises(ValueError, match="state lacks comparisons, current"):
        made.load_state_dict({"finished": 0, "reference": {}, "previous": {}})
    with pytest.raises(ValueError, match="the reference's weights do not fit"):
        made.load_state_dict({**made.state_dict(), "reference": {}})
    with pytest.raises(ValueError, match="size must be at least 1"):
        list(next(iter(made)).batches(0))
