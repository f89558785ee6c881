"""A scikit-learn classifier that minimises whatever you give it."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from . import checks, training
from .tables import TableEncoder, as_frame, load_encoder, save_encoder
from .training import Recipe

_FORMAT = 1


class ObjectiveClassifier(ClassifierMixin, BaseEstimator):
    """A network classifier whose training objective is a choice.

    Takes arrays, or polars and pandas frames of mixed columns, with missing values; see
    :class:`minimand.tables.TableEncoder` for how they are encoded.

    Args:
        loss: Any loss of minimand or torch.nn of scores ``(batch, classes)`` and class indices. None: cross-entropy.
        risk: A risk that replaces the mean over examples, or None.
        model: ``"linear"``, ``"mlp"``, ``"package.module:factory"`` or a callable, given features and classes.
        epochs: Passes over the data.
        batch_size: Examples a step.
        lr: Learning rate.
        weight_decay: Of the optimizer.
        optimizer: ``"adamw"``, ``"sgd"``, or a callable from parameters to an optimizer.
        schedule: ``"cosine"`` or ``"constant"``.
        class_weight: None, ``"balanced"``, or a dict from class to weight, for losses that take ``weight``.
        early_stopping: Whether to hold out data, stop when their accuracy no longer grows, and keep the best model.
        validation_fraction: Share of the data held out for that.
        patience: Epochs to wait for better accuracy.
        device: Where to train, for example ``"cuda"``. None: the CPU.
        random_state: Seed of initial weights, order and held-out data.

    Attributes:
        classes_: The class labels.
        model_: The trained network.
        loss_: The loss it was trained with.
        history_: Mean loss of each epoch.
        encoder_: What turns rows into features.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> features, labels = load_iris(return_X_y=True)
        >>> ObjectiveClassifier(epochs=20, random_state=0).fit(features, labels).score(features, labels) > 0.9
        True
    """

    def __init__(
        self,
        loss: nn.Module | None = None,
        *,
        risk: Callable[[Tensor], Tensor] | None = None,
        model: str | Callable[[Any, int], nn.Module] = "mlp",
        epochs: int = 30,
        batch_size: int = 64,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
        optimizer: str | Callable[..., torch.optim.Optimizer] = "adamw",
        schedule: str = "cosine",
        class_weight: str | Mapping[Any, float] | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        patience: int = 5,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.loss = loss
        self.risk = risk
        self.model = model
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.schedule = schedule
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> ObjectiveClassifier:
        """Train on features ``X`` ``(samples, features)`` and labels ``y`` ``(samples,)``.

        Raises:
            ValueError: If the data or a setting cannot be used.
        """
        frame, labels = self._check(X, y)
        check_classification_targets(labels)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class only, {self.classes_[0]!r}: the classifier needs at least two classes")
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            schedule=self.schedule,
        )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        device = torch.device("cpu" if self.device is None else self.device)
        kept, held = self._hold_out(numbers, seed)
        self.encoder_ = TableEncoder()
        inputs = torch.from_numpy(self.encoder_.fit_transform(frame[kept])).to(device)
        target = torch.from_numpy(numbers[kept]).to(device)
        classes = len(self.classes_)
        self.loss_ = self._objective(numbers[kept], classes).to(device)
        factory = training.model_factory(self.model)
        features = self.encoder_.n_features_out_
        self.model_ = training.seeded(lambda: factory(features, classes), seed).to(device)
        stop = None
        if held is not None:
            held_inputs = torch.from_numpy(self.encoder_.transform(frame[held])).to(device)
            stop = _Patience(self.model_, held_inputs, torch.from_numpy(numbers[held]).to(device), self.patience)
        self.history_ = training.fit(
            self.model_, self.loss_, inputs, target, recipe=recipe, seed=seed, after_epoch=stop
        )
        if stop is not None:
            self.model_.load_state_dict(stop.best)
            self.validation_accuracy_ = stop.accuracy
        self.loss_.eval()
        return self

    def decision_function(self, X: Any) -> NDArray[np.float32]:
        """Return scores ``(samples, classes)``; for two classes ``(samples,)``, the second's less the first's."""
        scores = self._scores(X).cpu().numpy()
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Return class probabilities ``(samples, classes)``, by the loss's own link."""
        scores = self._scores(X)
        with torch.no_grad():
            link = getattr(self.loss_, "link", None) or getattr(getattr(self.loss_, "loss", None), "link", None)
            probabilities = link(scores) if link is not None else torch.softmax(scores, dim=-1)
        return probabilities.cpu().numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the label of the largest score for each row."""
        check_is_fitted(self)
        return self.classes_[self._scores(X).argmax(1).cpu().numpy()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Store the fitted classifier in a folder: JSON, safetensors and a skops file; no pickle.

        Raises:
            ValueError: If the model or loss cannot be rebuilt from names and numbers.
        """
        from safetensors.torch import save_file

        check_is_fitted(self)
        folder = pathlib.Path(path)
        described = {
            "format": _FORMAT,
            "model": self.model if isinstance(self.model, str) else None,
            "features": self.encoder_.n_features_out_,
            "n_features_in": self.n_features_in_,
            "feature_names_in": list(self.feature_names_in_) if hasattr(self, "feature_names_in_") else None,
            "classes": self.classes_.tolist(),
            "classes_dtype": self.classes_.dtype.str if self.classes_.dtype != object else "object",
            "loss": _describe(self.loss_),
            "history": self.history_,
        }
        text = json.dumps(described, indent=1)  # before anything is written: it raises on what is not JSON
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(self.model_), folder / "model.safetensors")
        save_file(_tensors(self.loss_), folder / "loss.safetensors")
        save_encoder(self.encoder_, folder / "encoder.skops")
        (folder / "classifier.json").write_text(text + "\n")

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, model: str | Callable[[Any, int], nn.Module] | None = None
    ) -> ObjectiveClassifier:
        """Load a stored classifier, ready to predict.

        Args:
            path: The folder.
            model: What builds the network, if it was not ``"linear"`` or ``"mlp"``: a file is not trusted to name
                code to run.

        Raises:
            ValueError: If the folder holds no classifier, or one of a model that must be named.
        """
        from safetensors.torch import load_file

        folder = pathlib.Path(path)
        if not (folder / "classifier.json").exists():
            raise ValueError(f"{folder} holds no stored classifier")
        described = json.loads((folder / "classifier.json").read_text())
        if described["format"] != _FORMAT:
            raise ValueError(f"{folder} is of format {described['format']}, this version reads {_FORMAT}")
        named = described["model"] if model is None else model
        if model is None and named not in ("linear", "mlp"):
            raise ValueError(f"the stored model is {named!r}: say what builds it with load(..., model=...)")
        loaded = cls(model=named)
        loaded.classes_ = np.array(described["classes"], dtype=np.dtype(described["classes_dtype"]))
        loaded.n_features_in_ = described["n_features_in"]
        if described["feature_names_in"] is not None:
            loaded.feature_names_in_ = np.array(described["feature_names_in"], dtype=object)
        loaded.encoder_ = load_encoder(folder / "encoder.skops")
        loaded.model_ = training.model_factory(named)(described["features"], len(loaded.classes_))
        loaded.model_.load_state_dict(load_file(folder / "model.safetensors"))
        loaded.model_.eval()
        loaded.loss_ = _rebuild(described["loss"])
        _restore(loaded.loss_, load_file(folder / "loss.safetensors"))
        loaded.loss_.eval()
        loaded.loss = loaded.loss_
        loaded.history_ = described["history"]
        return loaded

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.non_deterministic = False
        return tags

    def _check(self, X: Any, y: Any = None) -> tuple[Any, Any]:
        """Validate as scikit-learn does; a frame keeps its columns' types."""
        is_frame = hasattr(X, "columns")
        reset = y is not None
        options: dict[str, Any] = {"ensure_all_finite": "allow-nan", "dtype": np.float32, "reset": reset}
        if is_frame:
            labels = None if y is None else _column(y)
            if labels is not None:
                if len(labels) != len(X):
                    raise ValueError(f"X has {len(X)} rows, y has {len(labels)}")
                if len(X) == 0:
                    raise ValueError("X has no rows")
            validate_data(self, X, skip_check_array=True, reset=reset)
            return as_frame(X), labels
        if reset:
            array, labels = validate_data(self, X, y, **options)
        else:
            array, labels = validate_data(self, X, **options), None
        return as_frame(array), labels

    def _hold_out(self, numbers: NDArray[np.int64], seed: int) -> tuple[Any, Any]:
        if not self.early_stopping:
            return np.arange(len(numbers)), None
        checks.between(self.validation_fraction, "validation_fraction", 0, 1, low_open=True, high_open=True)
        from sklearn.model_selection import train_test_split

        counts = np.bincount(numbers)
        stratify = numbers if counts.min() > 1 and self.validation_fraction * len(numbers) >= len(counts) else None
        return train_test_split(
            np.arange(len(numbers)), test_size=self.validation_fraction, random_state=seed, stratify=stratify
        )

    def _objective(self, numbers: NDArray[np.int64], classes: int) -> nn.Module:
        loss = nn.CrossEntropyLoss() if self.loss is None else copy.deepcopy(self.loss)
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be an nn.Module such as minimand.losses.ALDRKLLoss(), got {self.loss!r}")
        if self.class_weight is not None:
            if not hasattr(loss, "weight"):
                raise ValueError(f"class_weight: {type(loss).__name__} takes no class weights")
            weight = compute_class_weight(self.class_weight, classes=self.classes_, y=self.classes_[numbers])
            loss.weight = torch.tensor(weight, dtype=torch.float32)
        return loss if self.risk is None else training.with_risk(loss, self.risk)

    @torch.no_grad()
    def _scores(self, X: Any) -> Tensor:
        check_is_fitted(self)
        frame, _ = self._check(X)
        device = next(self.model_.parameters()).device
        inputs = torch.from_numpy(self.encoder_.transform(frame))
        return torch.cat([self.model_(part.to(device)) for part in inputs.split(8192)])


class _Patience:
    """Stops training when the accuracy on held-out data no longer grows, and remembers the best model."""

    def __init__(self, model: nn.Module, inputs: Tensor, target: Tensor, patience: int) -> None:
        self.model, self.inputs, self.target, self.patience = model, inputs, target, patience
        self.accuracy, self.waited, self.best = -math.inf, 0, copy.deepcopy(model.state_dict())

    @torch.no_grad()
    def __call__(self, epoch: int, loss: float) -> bool:
        self.model.eval()
        accuracy = float((self.model(self.inputs).argmax(1) == self.target).float().mean())
        self.model.train()
        if accuracy > self.accuracy:
            self.accuracy, self.waited = accuracy, 0
            self.best = copy.deepcopy(self.model.state_dict())
            return False
        self.waited += 1
        return self.waited >= self.patience


def _column(y: Any) -> NDArray[Any]:
    array = np.asarray(y.to_numpy() if hasattr(y, "to_numpy") else y)
    if array.ndim != 1:
        raise ValueError(f"y must have one dimension, got shape {array.shape}")
    missing = np.array([value is None or value != value for value in array]) if array.dtype.kind in "fO" else None
    if missing is not None and missing.any():
        raise ValueError(f"y contains NaN or missing labels in {int(missing.sum())} rows")
    return array.astype(str) if array.dtype == object and all(isinstance(value, str) for value in array) else array


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}


def _restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors, first giving buffers that were sized for a training set their size."""
    for name, value in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        present = getattr(owner, leaf, None)
        if leaf in owner._buffers and (present is None or present.shape != value.shape):
            owner._buffers[leaf] = torch.empty_like(value)
    module.load_state_dict(tensors)


def _describe(module: nn.Module) -> dict[str, Any]:
    """Describe a loss or risk by its class and the constructor arguments it keeps under their own names."""
    kind = type(module)
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        value = getattr(module, name, inspect.Parameter.empty)
        if name == "self" or value is inspect.Parameter.empty or isinstance(value, (Tensor, torch.Generator)):
            continue  # tensors travel in the state dict
        if isinstance(value, nn.Module):
            arguments[name] = {"module": _describe(value)}
        elif value is None or isinstance(value, (str, int, float, bool)):
            arguments[name] = value
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{kind.__name__} cannot be stored: its {name} is a {type(value).__name__}")
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "arguments": arguments}


def _rebuild(described: Mapping[str, Any]) -> nn.Module:
    module, _, name = described["class"].partition(":")
    if module.split(".")[0] != "minimand" and not module.startswith("torch.nn.modules.loss"):
        raise ValueError(f"a stored classifier may only hold losses of minimand and torch, not {described['class']}")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{described['class']} is not a loss")
    arguments = {
        key: _rebuild(value["module"]) if isinstance(value, dict) else value
        for key, value in described["arguments"].items()
    }
    return kind(**arguments)
