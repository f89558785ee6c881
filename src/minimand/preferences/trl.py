r"""Any objective of this room inside TRL: a ``DPOTrainer`` whose loss is an object of ours.

TRL's trainer keeps its data, collator, models, adapters, precomputed references, checkpoints and metrics' names; only
the loss of a batch is ours. This module imports TRL and is therefore not imported by the room: say
``from minimand.preferences.trl import PairLossTrainer``.

Works with TRL 1.0 and later: what is used of it are the batches of its collator (``input_ids``, ``completion_mask``,
chosen answers first), ``compute_loss``, and, from the release that has it, its LM head that never holds the scores of
a whole vocabulary.

Source: the documentation of ``transformers.Trainer``, which names ``compute_loss`` as the place for a loss of one's
own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from .log_probabilities import token_log_probabilities
from .pair_loss import PairLoss, PairTokens

try:
    from accelerate.utils import is_peft_model
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer import dpo_trainer
    from trl.trainer.utils import use_adapter
except ImportError as error:
    raise ImportError(f"training through TRL needs it: install minimand[preferences] ({error})") from None

# Settings of DPOConfig that say which loss TRL computes; the objective replaces them all.
_REPLACED = (
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "ld_alpha",
    "use_weighting",
)
_NO_INPUTS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_OBJECTIVE = "objective.safetensors"


class _Scores(NamedTuple):
    """What a model says of each token of a batch, chosen answers first; ``(2 * pairs, tokens)`` each.

    Args:
        log_probs: Log-probability of the token.
        entropy: Of the distribution it was drawn from.
        mean_logits: Mean score over the vocabulary.
        is_top1: Whether no token was likelier.
        hidden: Last hidden state that the token was predicted from, or None.
        auxiliary: Load-balancing loss of a mixture of experts, or None.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    hidden: Tensor | None = None
    auxiliary: Tensor | None = None


class _ClearGradients(TrainerCallback):
    """Clear the objective's gradients after each step: the trainer clears those of its model alone."""

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.objective.zero_grad()


class PairLossTrainer(DPOTrainer):
    r"""TRL's DPO trainer with any objective of this room in place of its loss.

    A reference model is loaded only for an objective with ``needs_reference``, and hidden states are computed only
    for one with ``needs_hidden``. Parameters of the objective are trained beside the policy's, without weight decay
    and without clipping, and saved with each checkpoint as ``objective.safetensors``. With
    ``precompute_ref_log_probs`` TRL keeps the reference's sums, which is enough for every objective that does not
    look at single tokens.

    Metrics have TRL's names; ``rewards/*`` are the objective's ``beta`` (1 where it has none) times the log-ratio to
    the reference, or times the log-probability for an objective without one.

    Args:
        model: As for ``DPOTrainer``: a model, or a name or folder to load it from.
        args: ``DPOConfig``. Its settings of the loss must be left alone: the objective has its own.
        train_dataset: Rows in TRL's preference format.
        objective: A module with ``from_tokens(PairTokens) -> scalar``, such as every loss of this room.
        **kwargs: Further arguments of ``DPOTrainer``: ``ref_model``, ``processing_class``, ``eval_dataset``,
            ``peft_config``, ``callbacks``, ...

    Raises:
        TypeError: If ``objective`` has no ``from_tokens``, or is a class.
        ValueError: If ``args`` sets a loss, or asks for what the objective cannot be given; or if the reference has
            another vocabulary than the policy.

    Example:
        >>> from minimand.preferences import SimPOLoss
        >>> trainer = PairLossTrainer(model, args, pairs, objective=SimPOLoss())  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Source:
        The interface of TRL 1.16 (von Werra et al.).
    """

    # Once built, a trainer has all of these; transformers types them as optional.
    args: Any
    model: Any
    state: Any
    objective: Any

    _tag_names = ["trl", "minimand"]  # noqa: RUF012 - TRL's own attribute
    _paper: dict[str, str] = {}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        args: Any = None,
        train_dataset: Any = None,
        *,
        objective: nn.Module,
        **kwargs: Any,
    ) -> None:
        if isinstance(objective, type) or not callable(getattr(objective, "from_tokens", None)):
            raise TypeError(
                f"objective must be an object with from_tokens, such as DPOLoss(), got {_described(objective)}"
            )
        args = DPOConfig(type(objective).__name__) if args is None else copy.copy(args)
        self.needs_reference = bool(getattr(objective, "needs_reference", True))
        self.needs_hidden = bool(getattr(objective, "needs_hidden", False))
        _check_settings(args, objective, self.needs_reference)
        precompute = args.precompute_ref_log_probs and self.needs_reference
        if not self.needs_reference:
            if kwargs.get("ref_model") is not None:
                raise ValueError(f"ref_model was given, but {type(objective).__name__} needs no reference")
            # TRL has no other way to be told to load no reference; nothing is precomputed, see below.
            args.precompute_ref_log_probs = not (kwargs.get("peft_config") or is_peft_model(model))
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.args.precompute_ref_log_probs = self.precompute_ref_logps = precompute
        if not self.needs_reference:
            self.ref_model = None
        _check_vocabularies(self.model, self.ref_model)
        self._name = type(objective).__name__
        self.objective = objective.to(self.accelerator.device)
        self.add_callback(_ClearGradients(self.objective))
        if self.accelerator.num_processes > 1:
            # Nothing else averages these gradients; the mean of what is already one is itself, so accumulation holds.
            for parameter in self._own_parameters():
                parameter.register_post_accumulate_grad_hook(self._average)

    def _own_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.objective.parameters() if parameter.requires_grad]

    def _average(self, parameter: Tensor) -> None:
        parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return super()._precompute_ref_logps(dataset, name, batch_size) if self.needs_reference else dataset

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make TRL's optimizer and give it the parameters of the objective too."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [parameter for parameter in self._own_parameters() if id(parameter) not in held]
        if missing and given:
            raise ValueError("optimizers holds an optimizer that lacks parameters of the objective: add them to it")
        if missing:
            optimizer.add_param_group({"params": missing, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the objective of one batch and note TRL's metrics.

        Args:
            model: The policy, wrapped as the trainer has it.
            inputs: A batch of TRL's collator.
            return_outputs: Whether to return the model's output as well, at the price of another forward pass.
            num_items_in_batch: Unused, as in TRL: the objective's reduction says how pairs add up.

        Returns:
            The loss, a scalar, or the loss and the output.

        Raises:
            ValueError: If the objective gives no scalar.
        """
        scores = self._score(model, inputs, metrics=True, hidden=self.needs_hidden)
        mask = inputs["completion_mask"][:, 1:].bool()
        with torch.no_grad(), self._reference() as reference:
            ref_logp = None if reference is None else self._score(reference, inputs).log_probs
        chosen, rejected = scores.log_probs.chunk(2)
        chosen_mask, rejected_mask = mask.chunk(2)
        ref_chosen, ref_rejected = _halves(ref_logp)
        chosen_hidden, rejected_hidden = _halves(scores.hidden)
        tokens = PairTokens(
            chosen, rejected, chosen_mask, rejected_mask, ref_chosen, ref_rejected, chosen_hidden, rejected_hidden
        )
        pairs = tokens.sums()
        self.objective.train(self.model.training)
        if self.precompute_ref_logps:
            pairs = pairs._replace(ref_chosen=inputs["ref_chosen_logps"], ref_rejected=inputs["ref_rejected_logps"])
            loss = self.objective.of(pairs)
        else:
            loss = self.objective.from_tokens(tokens)
        if loss.dim() != 0:
            raise ValueError(
                f"objective must reduce to a scalar, got shape {tuple(loss.shape)}: reduction='none' cannot train"
            )
        self._note(pairs, scores, mask, inputs)
        if scores.auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * scores.auxiliary
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**_model_inputs(inputs))

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module | None]:
        """Yield the model that plays the reference in this batch, or None."""
        if not self.needs_reference or self.precompute_ref_logps:
            yield None
            return
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is None and is_peft_model(self.model):
                policy = self.accelerator.unwrap_model(self.model)
                # TRL copies an adapter that comes trained to "ref"; without one the bare model is the reference.
                with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                    yield self.model
            else:
                yield self.ref_model

    def _score(
        self, model: nn.Module, inputs: dict[str, Any], *, metrics: bool = False, hidden: bool = False
    ) -> _Scores:
        """Compute log-probabilities of the tokens that follow each position, and what metrics ask for."""
        arguments = _model_inputs(inputs)
        width = inputs["input_ids"].shape[1] - 1
        balanced = metrics and getattr(self, "aux_loss_enabled", False)
        if balanced:
            arguments["output_router_logits"] = True
        # Prompt tuning puts columns of its own before the tokens: the last ones are the tokens'.
        if hasattr(dpo_trainer, "add_fused_lm_head") and not hidden:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            output = model(**arguments, labels=labels, fused_lm_head=True)
            auxiliary = output.aux_loss if balanced else None
            if not metrics:
                return _Scores(output.log_probs[:, -width:], auxiliary=auxiliary)
            return _Scores(
                output.log_probs[:, -width:],
                output.entropy[:, -width:].detach(),
                output.mean_logits[:, -width:],
                output.is_top1[:, -width:].bool(),
                auxiliary=auxiliary,
            )
        output = model(**arguments, output_hidden_states=hidden)
        logits, targets = output.logits[:, -width - 1 : -1], inputs["input_ids"][:, 1:]
        entropy, mean_logits, is_top1 = _summary(logits, targets) if metrics else (None, None, None)
        return _Scores(
            token_log_probabilities(logits, targets),
            entropy,
            mean_logits,
            is_top1,
            output.hidden_states[-1][:, -width - 1 : -1] if hidden else None,
            output.aux_loss if balanced else None,
        )

    @torch.no_grad()
    def _note(self, pairs: Any, scores: _Scores, mask: Tensor, inputs: dict[str, Any]) -> None:
        """Note the metrics of a batch under TRL's names, with one exchange between processes."""
        beta = float(getattr(self.objective, "beta", 1.0))
        zero = torch.zeros_like(pairs.chosen)
        chosen = beta * (pairs.chosen - (zero if pairs.ref_chosen is None else pairs.ref_chosen))
        rejected = beta * (pairs.rejected - (zero if pairs.ref_rejected is None else pairs.ref_rejected))
        first, second = mask.chunk(2)
        number = torch.tensor(float(len(chosen)), device=mask.device)
        # Each metric is a sum and what it is divided by, so that processes with fewer tokens count for less.
        ratios = {
            "rewards/chosen": (chosen.sum(), number),
            "rewards/rejected": (rejected.sum(), number),
            "rewards/accuracies": ((chosen > rejected).sum(), number),
            "rewards/margins": ((chosen - rejected).sum(), number),
            "logps/chosen": (pairs.chosen.sum(), number),
            "logps/rejected": (pairs.rejected.sum(), number),
        }
        if scores.entropy is not None and scores.mean_logits is not None and scores.is_top1 is not None:
            upper, lower = scores.mean_logits.chunk(2)
            ratios |= {
                "entropy": ((scores.entropy * mask).sum(), mask.sum()),
                "logits/chosen": ((upper * first).sum(), first.sum()),
                "logits/rejected": ((lower * second).sum(), second.sum()),
                "mean_token_accuracy": ((scores.is_top1.chunk(2)[0] & first).sum(), first.sum()),
            }
        if scores.auxiliary is not None:
            ratios["aux_loss"] = (scores.auxiliary, torch.ones_like(number))
        flat = torch.stack([part.float() for ratio in ratios.values() for part in ratio])
        tokens = inputs["attention_mask"].sum()[None]
        sums = self.accelerator.gather(flat[None]).sum(0).tolist()
        mode = "train" if self.model.training else "eval"
        for name, total, count in zip(ratios, sums[::2], sums[1::2], strict=True):
            self._metrics[mode][name].append(total / count if count else 0.0)
        if mode == "train":
            # Processes of one tensor-parallel group hold the same batch.
            self._total_train_tokens += int(self.accelerator.gather(tokens).sum()) // getattr(self, "_tp_size", 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as TRL does, and the objective's parameters and buffers beside it."""
        super().save_model(output_dir, _internal_call)
        state = {name: value.contiguous() for name, value in self.objective.state_dict().items()}
        if state and self.args.should_save:
            folder = pathlib.Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(state, folder / _OBJECTIVE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_objective(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_objective(self.state.best_model_checkpoint)

    def _load_objective(self, folder: str | os.PathLike[str]) -> None:
        if not self.objective.state_dict():
            return
        path = pathlib.Path(folder, _OBJECTIVE)
        if not path.is_file():
            raise ValueError(f"{folder} has no {_OBJECTIVE}: it was not written with this objective")
        device = str(self.accelerator.device)
        self.objective.load_state_dict(safetensors.torch.load_file(path, device=device))


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _check_settings(args: Any, objective: nn.Module, needs_reference: bool) -> None:
    """Raise for settings that would be silently without effect, or that contradict the objective."""
    name = type(objective).__name__
    for field in dataclasses.fields(DPOConfig):
        if field.name not in (*_REPLACED, "beta"):
            continue
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        value = getattr(args, field.name)
        agreed = field.name == "beta" and value == getattr(objective, "beta", None)
        if value != default and not agreed:
            raise ValueError(f"args.{field.name}={value!r} has no effect: {name} is the loss, set it there")
    if not needs_reference and args.sync_ref_model:
        raise ValueError(f"args.sync_ref_model is set, but {name} needs no reference")
    on_tokens = not (isinstance(objective, PairLoss) and type(objective).from_tokens is PairLoss.from_tokens)
    if args.precompute_ref_log_probs and needs_reference and on_tokens:
        raise ValueError(
            f"args.precompute_ref_log_probs keeps sums over tokens, but {name} looks at single tokens: switch it off, "
            "and the reference is computed with each batch"
        )


def _check_vocabularies(policy: Any, reference: Any) -> None:
    """Raise unless policy and reference give log-probabilities of the same tokens, as far as their settings say."""
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (policy, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(f"ref_model has a vocabulary of {sizes[1]} tokens, the policy one of {sizes[0]}")


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _NO_INPUTS} | {"use_cache": False}


def _halves(rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if rows is None:
        return None, None
    chosen, rejected = rows.chunk(2)
    return chosen, rejected


@torch.no_grad()
def _summary(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute entropy, mean score and whether the target is the likeliest, for each position."""
    scores = logits.float()
    log_p = scores.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1), scores.mean(-1), scores.argmax(-1) == targets
