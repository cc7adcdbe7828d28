"""Predict with a finished run: the class and probability of any input, in a process that knows nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headstart.core.validate import Refused, require
from headstart.zoo import Preprocess

from .prepared import Prepared, logits_of


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model together with how to feed it and what it says.

    Args:
        model: batch -> logits (n, c).
        preprocess: raw examples -> batch.
        classes: the names, in the order of the logits.
        modality: "image", "text" or "numeric".
    """

    model: nn.Module = field(repr=False)
    preprocess: Preprocess = field(repr=False)
    classes: tuple[str, ...]
    modality: str

    def logits(self, inputs: Any) -> Tensor:
        """Logits (n, c) of raw inputs: uint8 arrays (H, W, 3), picture files, texts, or rows of numbers."""
        raw = raw_inputs(inputs, self.modality)
        return logits_of(self.model, Prepared(inputs=raw, preprocess=self.preprocess))

    def probabilities(self, inputs: Any) -> Tensor:
        """Probabilities (n, c) in float64."""
        return self.logits(inputs).double().softmax(1)

    def predict(self, inputs: Any) -> list[str]:
        """The most probable class of each input."""
        return [self.classes[i] for i in self.logits(inputs).argmax(1).tolist()]


def load(directory: str | Path) -> Predictor:
    """The model of a finished run, or of any model directory.

    Args:
        directory: what `fit` wrote, or a folder with a model in it.

    Raises:
        Refused: nothing finished is there, or the model cannot be loaded whole.
    """
    path = Path(directory).expanduser()
    require(path.is_dir(), "predict needs the directory of a finished run", path, "Check the path.")
    if not (path / "model").is_dir() and (path / ".work").is_dir():
        raise Refused(f"predict needs a finished run; got {path}, which is unfinished. Run its fit command again.")
    from headstart.zoo.directory import load_model_directory
    from headstart.zoo.resolve import resolve

    folder = path / "model" if (path / "model").is_dir() else path
    model, preprocess, classes = load_model_directory(folder)
    [source], _ = resolve(f"dir:{folder}")
    names = classes or tuple(f"class {i}" for i in range(model.get_submodule(source.head).out_features))  # type: ignore[arg-type]
    return Predictor(model=model, preprocess=preprocess, classes=names, modality=source.modality)


def raw_inputs(inputs: Any, modality: str) -> Sequence[Any]:
    """Inputs as the sequence of raw examples a preprocessing takes.

    Raises:
        Refused: nothing to predict, or another kind of data.
    """
    import numpy as np

    from headstart.tasks import Images, Rows, Texts

    if isinstance(inputs, Images | Texts | Rows):
        return inputs
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    require(len(inputs) > 0, "predict needs at least one input", 0, "Pass some.")
    if modality == "text":
        texts = all(isinstance(one, str) for one in inputs)
        require(texts, "This model reads texts", type(inputs[0]).__name__, "Pass a list of str.")
        return Texts(inputs)
    if modality == "numeric":
        values = np.asarray(inputs, dtype=np.float32)
        require(values.ndim == 2, "This model reads rows of numbers (n, d)", values.shape, "Pass two dimensions.")
        require(bool(np.isfinite(values).all()), "Rows must be finite", "NaN or infinity", "Repair those rows.")
        return Rows(values)
    if isinstance(inputs[0], str | Path):
        missing = [str(one) for one in inputs if not Path(one).is_file()]
        require(not missing, "Every picture must exist", ", ".join(missing[:5]), "Check the paths.")
        return Images([Path(one) for one in inputs])
    pictures = [np.asarray(one) for one in inputs]
    wrong = next((p for p in pictures if p.ndim != 3 or p.shape[2] != 3 or p.dtype != np.uint8), None)
    require(wrong is None, "This model reads pictures as uint8 arrays (H, W, 3)",
            None if wrong is None else f"{wrong.dtype} {wrong.shape}", "Convert them, or pass files.")  # fmt: skip
    return Images(pictures)


def described(predictor: Predictor, names: Sequence[str], inputs: Any) -> Iterator[dict[str, Any]]:
    """One record an input: its name, the class, its probability, and that of every class."""
    for name, p in zip(names, predictor.probabilities(inputs), strict=True):
        best = int(p.argmax())
        yield {"input": name, "class": predictor.classes[best], "probability": float(p[best]),
               "probabilities": dict(zip(predictor.classes, p.tolist(), strict=True))}  # fmt: skip


def lines(records: Sequence[dict[str, Any]], kind: str) -> str:
    """Predictions as text: "csv" or "jsonl"."""
    if kind == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records)
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["input", "class", "probability", *(records[0]["probabilities"] if records else [])])
    for record in records:
        writer.writerow([record["input"], record["class"], repr(record["probability"]),
                         *map(repr, record["probabilities"].values())])  # fmt: skip
    return out.getvalue()
