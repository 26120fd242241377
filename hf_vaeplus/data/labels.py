"""What is known of each image besides its pixels, in the form that a conditional second stage is trained on."""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path

import torch

from ..files import build_once
from .folders import printable

MAX_CLASSES = 10_000
_EXPECTED = "whole numbers, texts, numbers, or lists of numbers"


@dataclass
class Labels:
    """The labels of n images.

    Attributes:
        kind: `"classes"` (one of several for each image), `"attributes"` (several that are 0 or 1) or `"factors"`
            (several numbers).
        id2label: names of the classes by their ids, or of attributes or factors by their place.
        values: of classes int64 of shape `(n,)`, the place of the id among all ids in rising order, -1 where it is not
            known; else float32 of shape `(n, number of names)`, NaN where it is not known.
    """

    kind: str
    id2label: dict[int, str]
    values: torch.Tensor

    @property
    def fingerprint(self) -> str:
        """What identifies kind, names and values: 32 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps([self.kind, sorted(self.id2label.items())]).encode())
        digest.update(self.values.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    @property
    def config(self) -> dict:
        """The fields of a second stage's config."""
        return {"condition": self.kind, "id2label": self.id2label}


def read_labels(images, column: str) -> Labels:
    """The labels of the images of a cache, in their order. A mirror image has those of its original.

    Args:
        images ([`~hf_vaeplus.data.cache.ImageDataset`]): as it was opened.
        column: of a table or data set: whole numbers, truth values or texts are classes; lists of 0 and 1 are
            attributes; other numbers, and lists of them, are factors. Folders of pictures, MNIST's files and digits
            call their labels `label`, rendered-faces `factors`. Missing values are not known.

    Raises:
        ValueError: there is no such column, or it holds something else, or the same for all images.
    """
    source = images.source
    is_remote = getattr(source, "sha", None) is not None
    rows, names = _kept(images, column) if is_remote else (source.labels(column), source.label_names(column))
    if rows is None:
        raise ValueError(
            f"{images.name} has no labels: sort its pictures into a folder for each class, or name images that have"
            " labels."
        )
    labels = labels_of([rows[number] for number in images.numbers], names, column)
    if images.random_flip:
        labels.values = torch.cat([labels.values, labels.values])
    return labels


def _kept(images, column: str) -> tuple[list, list[str] | None]:
    """Values and names of a column of a data set on the Hub, kept beside the images: they take a pass over it."""
    source = images.source
    key = hashlib.sha256(json.dumps([source.identity, column]).encode()).hexdigest()[:32]

    def build(path: Path):
        try:
            text = json.dumps([source.labels(column), source.label_names(column)])
        except TypeError as error:
            raise _refusal(column, f"something else ({error})", _EXPECTED) from error
        path.write_text(text, encoding="utf-8")

    def load(path: Path) -> tuple[list, list[str] | None]:
        rows, names = json.loads(path.read_text(encoding="utf-8"))
        return rows, names

    return build_once(images.path.parent.parent / "labels" / f"{key}.json", build, load)


def labels_of(rows: list, names: list[str] | None, column: str) -> Labels:
    """[`Labels`] of the values of a column; `names` are those of its classes, attributes or factors, if it has them.

    Raises:
        ValueError: see [`read_labels`].
    """
    rows = [None if isinstance(row, float) and math.isnan(row) else row for row in rows]
    known = [row for row in rows if row is not None]
    refuse = partial(_refusal, column)
    if not known:
        raise refuse("no value for any image", "a label of most of them")
    if all(isinstance(row, int) for row in known):
        return _classes(rows, names, refuse)
    if all(isinstance(row, str) for row in known):
        return _classes(rows, None, refuse)
    if all(isinstance(row, Real) for row in known):
        rows, names = [[row] for row in rows], [column]
    elif not all(isinstance(row, list) for row in known):
        kinds = " and ".join(sorted({type(row).__name__ for row in known}))
        raise refuse(f"values of the type {kinds}", _EXPECTED)
    return _values(rows, names, refuse)


def _refusal(column: str, got: str, expected: str) -> ValueError:
    return ValueError(f"label_column={column!r} holds {got}, expected {expected}: name another column.")


def _classes(rows: list, names: list[str] | None, refuse) -> Labels:
    if names is not None:  # where ids have names, -1 stands for none
        rows = [None if row == -1 else row for row in rows]
        if wrong := [row for row in rows if row is not None and not 0 <= row < len(names)]:
            raise refuse(f"the class {wrong[0]}", f"0 to {len(names) - 1}, as it names {len(names)} classes")
    found = sorted({row for row in rows if row is not None})
    if not 2 <= len(found) <= min(MAX_CLASSES, len(rows) // 2):
        raise refuse(
            f"{len(found):,} different labels for {len(rows):,} images",
            f"2 to {MAX_CLASSES:,} classes, with two images each on average",
        )
    place_of = {label: place for place, label in enumerate(found)}
    if isinstance(found[0], str):
        id2label = dict(enumerate(map(printable, found)))
    else:
        id2label = {int(label): str(label) if names is None else names[label] for label in found}
    return Labels("classes", id2label, torch.tensor([place_of.get(row, -1) for row in rows]))


def _values(rows: list, names: list[str] | None, refuse) -> Labels:
    lengths = sorted({len(row) for row in rows if row is not None})
    if len(lengths) > 1 or not lengths[0]:
        raise refuse(f"lists of {lengths[0]} to {lengths[-1]} values", "one length of at least 1")
    dim = lengths[0]
    rows = [[None] * dim if row is None else row for row in rows]
    numbers = [number for row in rows for number in row if number is not None]
    for number in numbers:
        if not isinstance(number, Real) or math.isinf(number):
            raise refuse(f"{str(number)[:40]!r} in a list", "finite numbers")
    values = torch.tensor([[math.nan if number is None else number for number in row] for row in rows])
    values = values.to(torch.float32)
    known = values.isfinite()
    if all(values[known[:, place], place].unique().numel() < 2 for place in range(dim)):
        raise refuse("the same values for all images", "some that differ")
    kind = "attributes" if bool(((values == 0) | (values == 1) | ~known).all()) else "factors"
    names = list(names) if names is not None and len(names) == dim else [str(place) for place in range(dim)]
    return Labels(kind, dict(enumerate(names)), values)
