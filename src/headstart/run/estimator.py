"""A classifier in scikit-learn's words that starts from pretrained models."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from headstart.core.validate import require
from headstart.tasks import Examples, Images, Rows, Task, Texts
from headstart.tasks.found import Modality
from headstart.tasks.task import Seal
from headstart.zoo.resolve import resolve

from .begin import chosen, start_of
from .cache import Cache
from .directory import RunDirectory
from .fit import tuned
from .predict import Predictor, raw_inputs
from .settings import Tuning
from .threads import threads_for

if TYPE_CHECKING:
    from headstart.zoo import Source


class HeadstartClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classify pictures, texts or rows of numbers, starting from what pretrained models know.

    `fit` ranks the zoo, compares routes by cross-validation on the data it is given, and trains the best one on all
    of it. Nothing is held back for a test: that is the caller's part, as everywhere in scikit-learn.

    Args:
        zoo: where to start from, as for `fit_task`: names joined by commas, or a sequence of names and sources.
        routes: ways to move the knowledge across that are compared.
        seed: of everything random.
        budget: what choosing may cost, as a share of fine-tuning every source.
        epochs: passes over the data when tuning; 16 to 400 steps.
        batch_size: examples a step.
        folds: of the cross-validation that picks the route.
        augment: jitter pictures while tuning.
        device: "auto", "cpu" or "cuda".

    Attributes:
        classes_: the labels, sorted.
        source_: name of the source it started from.
        route_: how it was moved.
        model_: the `Predictor`.

    X is a uint8 array (n, H, W, 3) or (n, H, W) or a sequence of picture files, a sequence of texts, or a matrix of
    numbers (n, d), which needs a zoo with a source for such rows.

    >>> HeadstartClassifier(zoo="mini", routes=("probe",))
    HeadstartClassifier(routes=('probe',))
    """

    def __init__(
        self,
        zoo: str | Sequence[str | Source] = "mini",
        *,
        routes: Sequence[str] = ("probe", "bayes", "lpft"),
        seed: int = 0,
        budget: float = 0.1,
        epochs: int = 10,
        batch_size: int = 32,
        folds: int = 5,
        augment: bool = False,
        device: str = "auto",
    ) -> None:
        self.zoo = zoo
        self.routes = routes
        self.seed = seed
        self.budget = budget
        self.epochs = epochs
        self.batch_size = batch_size
        self.folds = folds
        self.augment = augment
        self.device = device

    def fit(self, X: Any, y: Any) -> HeadstartClassifier:
        """Choose, compare and train.

        Raises:
            ValueError: bad input, or no source fits.
        """
        modality, inputs, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        require(len(self.classes_) > 1, "HeadstartClassifier needs more than one class", f"{len(self.classes_)} class",
                "Add examples of another class.")  # fmt: skip
        tuning = Tuning(
            routes=tuple(self.routes), seed=self.seed, budget=self.budget, epochs=self.epochs, folds=self.folds,
            batch_size=self.batch_size, augment=self.augment, device=self.device,  # type: ignore[arg-type]
        ).checked()  # fmt: skip
        task = _task(modality, inputs, codes, [str(label) for label in self.classes_])
        listed, skipped = resolve(self.zoo)
        with tempfile.TemporaryDirectory() as work, threads_for(listed):
            cache = Cache(device=self.device)
            sources, choice = chosen(task, listed, skipped, tuning, cache, None)
            start = start_of(task, sources[str(choice.best)], tuning, cache)
            with closing(RunDirectory(Path(work) / "run", "", {})) as directory:
                _, best, trained = tuned(task, start, tuning, directory, None)
        self.source_, self.route_, self.modality_ = start.source.name, best.route, modality
        self.model_ = Predictor(model=trained.model.to("cpu"), preprocess=start.source.preprocess,
                                classes=task.classes, modality=modality)  # fmt: skip
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities (n, classes), in the order of `classes_`."""
        check_is_fitted(self, "model_")
        modality, inputs, _ = self._checked(X, None)
        require(modality == self.modality_, f"This classifier was fitted on {self.modality_} data", modality,
                "Pass the same kind.")  # fmt: skip
        made: NDArray[np.float64] = self.model_.probabilities(inputs).numpy()
        return made

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable label of each example."""
        best = self.predict_proba(X).argmax(1)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    def _checked(self, X: Any, y: Any) -> tuple[Modality, Any, Any]:
        """The kind of data, the raw inputs, and the labels as a vector."""
        kind = modality_of(X)
        if kind == "numeric":
            if y is None:
                return kind, Rows(validate_data(self, X, reset=False, dtype=np.float32)), None
            values, labels = validate_data(self, X, y, dtype=np.float32)
            return kind, Rows(values), labels
        grey = kind == "image" and isinstance(X, np.ndarray) and X.ndim == 3
        inputs = raw_inputs(np.repeat(X[..., None], 3, axis=-1) if grey else X, kind)
        if y is None:
            return kind, inputs, None
        labels = column_or_1d(y, warn=True)
        require(
            len(labels) == len(inputs), "fit needs one label an example", f"{len(labels)} for {len(inputs)}", "Align."
        )
        return kind, inputs, labels


def modality_of(X: Any) -> Modality:
    """ "image" for pictures and picture files, "text" for other texts, "numeric" for everything else."""
    from .inputs import PICTURES

    if isinstance(X, Images) or (isinstance(X, np.ndarray) and X.ndim in (3, 4)):
        return "image"
    if isinstance(X, Texts):
        return "text"
    first = X[0] if isinstance(X, list | tuple) and len(X) else None
    if isinstance(first, Path) or (isinstance(first, str) and first.lower().endswith(PICTURES)):
        return "image"
    if isinstance(first, np.ndarray) and first.ndim == 3:
        return "image"
    return "text" if isinstance(first, str) else "numeric"


def _task(modality: Modality, inputs: Any, codes: NDArray[np.int64], classes: list[str]) -> Task:
    """A task of labelled examples only."""
    none = Examples(inputs=inputs.take([]), names=())
    names = tuple(str(i) for i in range(len(inputs)))
    train = Examples(inputs=inputs, names=names, labels=torch.from_numpy(codes.astype(np.int64)))
    return Task(name="fit", modality=modality, classes=tuple(classes), train=train, validation=none, test=none,
                unlabelled=none, seed=0, target="arrays", manifest="", seal=Seal(None))  # fmt: skip
