r"""Watch gradient entanglement while a trainer runs: numbers in its log, and a chart when it is done.

Every so many steps a few pairs are put through the policy before and after the optimizer's step. The gradients of
their log-probabilities by the last blocks' linear layers, :class:`LayerGradients`, tell how entangled they are; the
step that was taken, whatever the optimizer, tells what it does to them through these layers to first order; and the
log-probabilities after it tell what it did.

Source: Yuan, Zeng, Wu, Wang, Wang and Leqi, ICLR 2025, arXiv 2410.13828: cosines and log-probabilities over training.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gradient_entanglement import Regime, margin_coefficients
from .layer_gradients import LayerGradients, PairGradients, last_linear_layers
from .pair_loss import PairLogProbabilities, PairLoss
from .pairs import PairBatch, TokenPair, collate_pairs, pair_log_probabilities

_PREFIX = "entanglement/"


class EntanglementCallback:
    """A callback for ``transformers.Trainer`` and what is built on it: TRL's DPOTrainer, PairLossTrainer.

    It answers every event that a ``TrainerCallback`` does without being one, so that this room needs no transformers.
    It changes nothing in the run: no random number is drawn and no gradient is touched. Only the main process
    measures, on the policy as it is held there, so sharded parameters (FSDP, ZeRO-3) are refused.

    Means over the pairs go into the trainer's log under ``entanglement/``, and stay in :attr:`history`:

    - ``cosine``, ``ratio``: of the two gradients; see :class:`Entanglement`. At a ratio of 1 a loss with equal
      coefficients starts to move both log-probabilities the same way.
    - ``desired``, ``both_up``, ``both_down``: shares of the pairs that a plain gradient step would take there.
    - ``chosen_update``, ``rejected_update``: first-order change by the optimizer's own step of the watched layers.
    - ``chosen_change``, ``rejected_change``: what the whole step did to the log-probabilities.
    - ``chosen_logp``, ``rejected_logp``: the log-probabilities before the step, in nats.

    Args:
        pairs: The pairs to watch, best held-out ones; None for the first ``num_pairs`` of the training data.
        num_pairs: How many, where ``pairs`` is None.
        every: Steps from one measurement to the next. One costs about what a step on that many pairs does.
        num_blocks: How many of the last blocks to watch.
        layers: From the model to the linear layers to watch, in place of the last blocks'.
        loss: Whose coefficients the regimes are of, if the loss is not one of the margin alone; the policy at the
            start is its reference.
        path: Where to write the chart; None for ``entanglement.svg`` in the trainer's output folder.

    Attributes:
        history: One dictionary a measurement, with its ``step``.

    Example:
        >>> callback = EntanglementCallback(every=5)
        >>> trainer = trl.DPOTrainer(model, args=args, train_dataset=pairs, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> callback.history
        []

    Source:
        Yuan et al. 2025, arXiv 2410.13828.
    """

    def __init__(
        self,
        pairs: Sequence[TokenPair] | None = None,
        *,
        num_pairs: int = 8,
        every: int = 10,
        num_blocks: int = 1,
        layers: Callable[[nn.Module], list[nn.Module]] | None = None,
        loss: PairLoss | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value in (("num_pairs", num_pairs), ("every", every), ("num_blocks", num_blocks)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if pairs is not None and not pairs:
            raise ValueError("pairs is empty: there is nothing to watch")
        self.pairs = None if pairs is None else list(pairs)
        self.num_pairs = num_pairs
        self.every = every
        self.num_blocks = num_blocks
        self.layers = layers
        self.loss = loss
        self.path = path
        self.history: list[dict[str, float]] = []
        self._batch: PairBatch | None = None
        self._record: LayerGradients | None = None
        self._reference: tuple[Tensor, Tensor] | None = None
        self._before: tuple[PairGradients, PairLogProbabilities, list[Tensor], dict[str, float]] | None = None

    def __getattr__(self, name: str) -> Any:
        """Let events pass that it does not listen to."""
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose pairs and layers."""
        if not state.is_world_process_zero:
            return
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ValueError("EntanglementCallback needs the parameters in one place: not with FSDP or DeepSpeed")
        model = kwargs["model"]
        pairs = _first_pairs(kwargs.get("train_dataloader"), self.num_pairs) if self.pairs is None else self.pairs
        self._batch = collate_pairs(pairs, share_prompt=False)
        self._record = LayerGradients(
            last_linear_layers(model, num_blocks=self.num_blocks) if self.layers is None else self.layers(model)
        )
        self.history = []
        with torch.no_grad():
            start = self._log_probabilities(model)
        self._reference = start.chosen, start.rejected

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the policy before the optimizer's step, where one is due."""
        if self._record is None or state.global_step % self.every:
            return
        with torch.enable_grad(), self._record:
            pairs = self._log_probabilities(kwargs["model"])
        gradients = self._record.pair_gradients(pairs.chosen, pairs.rejected)
        pairs = pairs._replace(chosen=pairs.chosen.detach(), rejected=pairs.rejected.detach())
        coefficients = None if self.loss is None else margin_coefficients(self.loss, pairs)
        found = gradients.entanglement(coefficients)
        numbers = {
            "cosine": float(found.cosine.mean()),
            "ratio": float(found.ratio.mean()),
            "desired": found.share(Regime.DESIRED),
            "both_up": found.share(Regime.BOTH_UP),
            "both_down": found.share(Regime.BOTH_DOWN),
            "chosen_logp": float(pairs.chosen.mean()),
            "rejected_logp": float(pairs.rejected.mean()),
        }
        self._before = gradients, pairs, [value.detach().clone() for value in self._record.parameters()], numbers

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what the step did, and keep the numbers."""
        if self._before is None or self._record is None:
            return
        gradients, pairs, before, numbers = self._before
        self._before = None
        updates = [now.detach() - was for now, was in zip(self._record.parameters(), before, strict=True)]
        chosen, rejected = gradients.change(updates)
        with torch.no_grad():
            after = self._log_probabilities(kwargs["model"])
        self.history.append(
            {
                "step": float(state.global_step),
                **numbers,
                "chosen_update": float(chosen.mean()),
                "rejected_update": float(rejected.mean()),
                "chosen_change": float((after.chosen - pairs.chosen).mean()),
                "rejected_change": float((after.rejected - pairs.rejected).mean()),
            }
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the latest numbers to what the trainer logs of its training."""
        logs = kwargs.get("logs")
        if not self.history or logs is None or "loss" not in logs:
            return
        latest = {_PREFIX + name: value for name, value in self.history[-1].items() if name != "step"}
        logs.update(latest)
        if state.log_history:
            state.log_history[-1].update(latest)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the chart."""
        if self.history:
            self.draw(pathlib.Path(args.output_dir, "entanglement.svg") if self.path is None else self.path)
        self._record = self._batch = self._reference = self._before = None

    def draw(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Draw the history: log-probabilities, how entangled the gradients are, and where a step would go.

        Args:
            path: Where to write the SVG; its folder is made.

        Returns:
            The path.

        Raises:
            ValueError: If nothing was measured yet.
        """
        if not self.history:
            raise ValueError("history is empty: nothing was measured yet")
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        steps = [row["step"] - 1 for row in self.history]

        def column(name: str) -> list[float]:
            return [row[name] for row in self.history]

        figure = Figure(figsize=(12, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        likely, entangled, regimes = figure.subplots(1, 3)
        for name, color in (("chosen", "tab:blue"), ("rejected", "tab:red")):
            values = column(f"{name}_logp")
            likely.plot(steps, [value - values[0] for value in values], color=color, label=name)
        likely.axhline(0, color="gray", linewidth=0.8)
        likely.set_title("Change of log-probability (nats)")
        entangled.plot(steps, column("cosine"), color="tab:purple", label="cosine")
        entangled.plot(steps, column("ratio"), color="tab:orange", label="inner product / smaller squared norm")
        entangled.axhline(1, color="gray", linewidth=0.8)
        entangled.set_title("Entanglement of the two gradients")
        shares = [column(name) for name in ("desired", "both_up", "both_down")]
        rest = [max(0.0, 1 - sum(row)) for row in zip(*shares, strict=True)]
        labels = ("chosen up, rejected down", "both up", "both down", "other")
        colors = ("tab:green", "tab:cyan", "tab:red", "lightgray")
        regimes.stackplot(steps, *shares, rest, labels=labels, colors=colors, step="mid")
        regimes.set_ylim(0, 1)
        regimes.set_title("Where a step takes the pairs (share)")
        for axes in (likely, entangled, regimes):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(fontsize="small")
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same numbers give the same file: no random names, no date.
        with matplotlib.rc_context({"svg.hashsalt": "minimand"}):
            figure.savefig(path, format="svg", metadata={"Date": None})
        return path

    def _log_probabilities(self, model: nn.Module) -> PairLogProbabilities:
        assert self._batch is not None
        with _evaluating(model):
            pairs = pair_log_probabilities(model, self._batch).sums()
        if self._reference is None:
            return pairs
        return pairs._replace(ref_chosen=self._reference[0], ref_rejected=self._reference[1])


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off, and every module back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _first_pairs(loader: Any, count: int) -> list[TokenPair]:
    """Take the first pairs of a loader's data as they are stored: no batch is drawn, and no random number."""
    data = getattr(loader, "dataset", None)
    if data is None or not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        raise ValueError("pairs must be given: the training data cannot be read by number")
    found = []
    for place in range(min(count, len(data))):
        row = data[place]
        if not isinstance(row, TokenPair):
            keys = ("prompt_ids", "chosen_ids", "rejected_ids")
            missing = [key for key in keys if key not in row]
            if missing:
                raise ValueError(f"pairs must be given: the training data have no {', '.join(map(repr, missing))}")
            row = TokenPair(*(tuple(row[key]) for key in keys))
        found.append(row)
    return found
