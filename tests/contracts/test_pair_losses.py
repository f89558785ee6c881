"""What every objective on pairs of answers keeps: shapes, dtypes, gradients, errors, and the way trainers call it."""

import inspect

import pytest
import torch

from minimand import preferences
from minimand.preferences import PairLogProbabilities, PairLoss, PairTokens

# Settings that a leaf cannot be built without.
SETTINGS: dict[str, dict] = {}
LOSSES = [
    name
    for name in preferences.__all__
    if inspect.isclass(part := getattr(preferences, name)) and issubclass(part, PairLoss) and part is not PairLoss
]


def built(name, **settings):
    return getattr(preferences, name)(**SETTINGS.get(name, {}), **settings)


def pairs(dtype=torch.float64, batch=5):
    generator = torch.Generator().manual_seed(0)
    rows = [-20 - 5 * torch.rand(batch, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = [torch.randint(3, 9, (batch,), generator=generator) for _ in range(2)]
    chosen, rejected, ref_chosen, ref_rejected = (row.to(dtype) for row in rows)
    return PairLogProbabilities(
        chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected, lengths[0], lengths[1]
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pair_loss_is_a_finite_scalar_with_finite_gradients_in_the_dtype_of_its_input(name, dtype):
    given = pairs(dtype)
    value = built(name).of(given)
    value.backward()
    assert value.shape == ()
    assert value.dtype == dtype
    assert torch.isfinite(value)
    assert torch.isfinite(given.chosen.grad).all()
    assert given.rejected.grad is None or torch.isfinite(given.rejected.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_of_a_pair_loss_agree(name):
    each = built(name, reduction="none").of(pairs())
    assert each.shape == (5,)
    assert torch.allclose(built(name).of(pairs()), each.mean())
    assert torch.allclose(built(name, reduction="sum").of(pairs()), each.sum())
    assert torch.allclose(built(name, reduction=torch.amax).of(pairs()), each.amax())


@pytest.mark.untyped
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("field", ["chosen", "rejected", "ref_chosen", "ref_rejected"])
def test_a_pair_loss_refuses_what_is_no_number(name, field):
    loss = built(name)
    if field.startswith("ref") and not loss.needs_reference:
        return
    broken = getattr(pairs(), field).detach().clone()
    broken[1] = float("nan")
    with pytest.raises(ValueError, match=f"logp_{field.removeprefix('ref_')} contains NaN"):
        loss.of(pairs()._replace(**{field: broken}))


@pytest.mark.untyped
@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_loss_says_what_is_missing(name):
    loss = built(name)
    given = pairs()._replace(ref_chosen=None, ref_rejected=None)
    if loss.needs_reference:
        with pytest.raises(ValueError, match="ref_logp_chosen is missing"):
            loss.of(given)
    else:
        assert torch.isfinite(loss.of(given))
    given = pairs()._replace(chosen_lengths=None)
    if loss.needs_lengths:
        with pytest.raises(ValueError, match="chosen_lengths is missing"):
            loss.of(given)
    else:
        assert torch.isfinite(loss.of(given))


@pytest.mark.untyped
@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_loss_refuses_a_reference_that_learns_and_shapes_that_differ(name):
    loss = built(name)
    if loss.needs_reference:
        learning = pairs().ref_chosen.clone().requires_grad_()
        with pytest.raises(ValueError, match="ref_logp_chosen requires a gradient"):
            loss.of(pairs()._replace(ref_chosen=learning))
    with pytest.raises(ValueError, match="one log-probability a pair"):
        loss.of(pairs()._replace(rejected=torch.zeros(3, dtype=torch.float64)))


@pytest.mark.parametrize("name", LOSSES)
def test_what_padding_holds_changes_nothing(name):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, ref_chosen, ref_rejected = (
        -3 * torch.rand(2, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])

    def value(filler):
        padded = [torch.where(mask, row, torch.full_like(row, filler)) for row in (chosen, rejected, ref_chosen)]
        tokens = PairTokens(padded[0], padded[1], mask, mask, padded[2], ref_rejected)
        return built(name).from_tokens(tokens)

    assert torch.equal(value(0.0), value(-7.0))
