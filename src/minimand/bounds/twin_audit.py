r"""The self-labelled twin: a second world that no measure of a model and its training set can tell from the first.

Let a classifier :math:`h` have no training error on :math:`S`, drawn from a distribution with labels :math:`f`, and
error :math:`L` on it. The twin distribution has the same inputs with labels :math:`h(x)`. The training set is as likely
there, training gives the same :math:`h`, every number :math:`C(h, S)` is the same, and the error is 0. So for every
:math:`C`, however it was made,

.. math:: \max(|C - L|, |C - 0|) \ge L / 2.

Where :math:`h` misfits some of :math:`S`, the twin keeps the labels of these inputs. On a finite domain its error is
then their mass :math:`\mu`, and the floor is :math:`(L - \mu) / 2`; or the error is taken on inputs outside :math:`S`
alone, where that of the twin is 0 again.

What it does not show: that a measure is wrong on the data at hand, or that it ranks models badly. It shows that a
measure is right here only by an assumption on the data that excludes the twin. Where distributions come from a family
closed under relabelling, such as uniformly random labels, the argument becomes a statement on probabilities
(:class:`minimand.bounds.ShatteredGame`).

Source: Gastpar, Nachum, Shafer and Weinberger, "Fantastic Generalization Measures are Nowhere to be Found", ICLR 2024,
arXiv 2309.13658, whose first theorem this makes an audit of; the twin and its constants are derived here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from .weight_matrices import require_evaluation

Estimator = Callable[[nn.Module, Tensor, Tensor], Tensor | float]


@dataclasses.dataclass(frozen=True)
class AuditRow:
    """One estimate of the error in both worlds.

    Args:
        name: Whose.
        estimate: What it says in the real world.
        twin_estimate: What it says in the twin: the same, unless it looks at fresh data.
        error: How far it is from the true error in the real world.
        twin_error: How far it is from the true error in the twin.
    """

    name: str
    estimate: float
    twin_estimate: float
    error: float
    twin_error: float

    @property
    def worst(self) -> float:
        """The larger of the two errors."""
        return max(self.error, self.twin_error)


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What :func:`twin_audit` found.

    Args:
        loss: Error rate in the real world.
        twin_loss: Error rate in the twin.
        floor: What no function of the model and its training set can be closer than in the worse world.
        table: One row an estimator; the last, ``"hold-out"``, looks at fresh data, if any were given.
        twin_target: Labels of the population in the twin world.
    """

    loss: float
    twin_loss: float
    floor: float
    table: tuple[AuditRow, ...]
    twin_target: Tensor

    def __getitem__(self, name: str) -> AuditRow:
        """Return the row of that name."""
        return next(row for row in self.table if row.name == name)

    def __str__(self) -> str:
        """Show the table."""
        width = max([len(row.name) for row in self.table] + [9])
        lines = [f"{'':{width}}  estimate  |C - L|  in the twin  worst"]
        lines += [
            f"{row.name:{width}}  {row.estimate:8.4g}  {row.error:7.4g}  {row.twin_error:11.4g}  {row.worst:.4g}"
            for row in self.table
        ]
        lines.append(
            f"error {self.loss:.4g}, {self.twin_loss:.4g} in the twin: no function of the model and its training set "
            f"is closer than {self.floor:.4g} in both"
        )
        return "\n".join(lines)


def twin_audit(
    model: nn.Module,
    inputs: Float[Tensor, "examples ..."],
    target: Int[Tensor, " examples"],
    *,
    population: tuple[Tensor, Tensor],
    measures: Mapping[str, Estimator] | None = None,
    holdout: tuple[Tensor, Tensor] | None = None,
    misfits: str = "refuse",
) -> AuditReport:
    """Build the twin of a trained classifier's world and measure estimates of its error in both.

    Args:
        model: Scores ``(examples, classes)``, in evaluation mode.
        inputs: The training inputs.
        target: The training labels, class indices.
        population: Inputs and labels whose error rate is the true one: the whole domain, each row of the same mass, or
            a large fresh sample.
        measures: Estimates of the error by name, ``measure(model, inputs, target)``; each is computed in both worlds.
        holdout: Fresh inputs and labels for a control: the error rate on them. It is no function of the model
            and its training set, and the theorem does not bind it.
        misfits: What to do where the model misfits training examples. ``"refuse"``: raise. ``"domain"``: the population
            is the whole domain, in which their inputs are looked up to keep their labels. ``"unseen"``: the population
            and the hold-out have none of the training inputs, and the error audited is that on unseen inputs.

    Returns:
        Errors in both worlds, the floor, and a row for every estimate.

    Raises:
        ValueError: If there are training errors and ``misfits`` is ``"refuse"``, a misfitted input is not in the
            population and it is ``"domain"``, the model is in training mode, or a measure is NaN, infinite or not the
            same number when it is computed twice.

    Example:
        >>> model = nn.Linear(1, 2, bias=False).eval()
        >>> model.weight.data = torch.tensor([[-1.0], [1.0]])  # predicts the sign
        >>> inputs, target = torch.tensor([[-2.0], [1.0]]), torch.tensor([0, 1])
        >>> population = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 1, 1, 1])
        >>> measures = {"never wrong": lambda model, inputs, target: 0.0}
        >>> report = twin_audit(model, inputs, target, population=population, measures=measures)
        >>> report.loss, report.floor, report["never wrong"].worst
        (0.25, 0.125, 0.25)

    Source:
        Gastpar et al. 2024, arXiv 2309.13658, the first theorem; the twin is derived here.
    """
    checks.one_of(misfits, "misfits", ("refuse", "domain", "unseen"))
    require_evaluation(model)
    with torch.no_grad():
        predicted = _predict(model, inputs, target, "target")
        domain, labels = population
        twin = _predict(model, domain, labels, "population")
    loss = _rate(twin != labels)
    misfit = predicted != target
    twin_loss, kept = 0.0, inputs[misfit][:0]
    if bool(misfit.any()) and misfits == "refuse":
        raise ValueError(
            f"the model misfits {int(misfit.sum())} of {len(target)} training examples: labelled by the model, the "
            f"training set would be another, and a measure could tell. Train to zero error, or give the whole finite "
            f'domain as population and misfits="domain", or unseen inputs and misfits="unseen"'
        )
    if bool(misfit.any()) and misfits == "domain":
        kept = inputs[misfit]
        seen = _places(kept, domain)
        twin_loss = _rate(seen & (twin != labels))
        twin = torch.where(seen, labels, twin)
    # In the twin the training labels are the model's own where it is right, and the real ones where it is not.
    twin_training = torch.where(misfit, target, predicted)
    rows = []
    for name, measure in (measures or {}).items():
        estimate = _estimate(measure, name, model, inputs, target)
        again = _estimate(measure, name, model, inputs, twin_training)
        if again != estimate:
            raise ValueError(
                f"measure {name!r} is {estimate} and then {again} on the same training set: it draws random numbers, "
                f"and must be given a fixed seed"
            )
        rows.append(AuditRow(name, estimate, again, abs(estimate - loss), abs(again - twin_loss)))
    if holdout is not None:
        fresh, fresh_labels = holdout
        with torch.no_grad():
            wrong = _predict(model, fresh, fresh_labels, "holdout") != fresh_labels
        estimate = _rate(wrong)
        # Labelled by the model itself, fresh inputs are never wrong, but for those that keep their labels.
        held_twin = _rate(wrong & rows_among(fresh, kept))
        rows.append(AuditRow("hold-out", estimate, held_twin, abs(estimate - loss), abs(held_twin - twin_loss)))
    return AuditReport(loss, twin_loss, max(loss - twin_loss, 0.0) / 2, tuple(rows), twin)


def _predict(model: nn.Module, inputs: Tensor, target: Tensor, name: str) -> Tensor:
    checks.not_empty(inputs, name)
    checks.finite(inputs, f"inputs of {name}")
    scores = torch.cat([model(part) for part in inputs.split(4096)])
    checks.class_scores(scores, target)
    checks.finite(scores, "the model's scores")
    return scores.argmax(1)


def _rate(wrong: Tensor) -> float:
    return int(wrong.sum()) / len(wrong)


def _estimate(measure: Estimator, name: str, model: nn.Module, inputs: Tensor, target: Tensor) -> float:
    # A copy, so that a measure that moves the weights leaves no trace for the next.
    found = measure(copy.deepcopy(model), inputs, target)
    value = float(found.detach() if isinstance(found, Tensor) else found)
    if value != value or abs(value) == float("inf"):
        raise ValueError(f"measure {name!r} is {value}: it must be a finite number")
    return value


def _places(rows: Tensor, domain: Tensor) -> Tensor:
    """Return where in the domain the rows are."""
    found = rows_among(domain, rows)
    if int(rows_among(rows, domain).sum()) < len(rows):
        raise ValueError('misfits="domain" needs the whole domain as population: a misfitted training input is absent')
    return found


def rows_among(rows: Tensor, others: Tensor) -> Tensor:
    """Tell which rows are equal to one of the others."""
    _, kind = torch.unique(torch.cat([rows, others]).flatten(1), dim=0, return_inverse=True)
    return torch.isin(kind[: len(rows)], kind[len(rows) :])
