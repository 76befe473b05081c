"""Giving a picture its label: a folder of pictures for each label, or rows that name pictures and their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from quadapt.data import Encoded
from quadapt.data.bad import BadRows
from quadapt.data.tables import Cells, Table, column_of
from quadapt.errors import DataError
from quadapt.tasks.base import TASKS, Collate, Reading
from quadapt.tasks.classifier import Classifier
from quadapt.tasks.examples import encoded
from quadapt.tasks.labels import LABEL, Labels, label_cell
from quadapt.tasks.pictures import PICTURE, joined, opened, picture_of, pillow, read_beside


@TASKS.register("image-classification")
class ImageClassification(Classifier):
    """A model gives a picture its label. Pictures are opened when they are needed, and none is kept."""

    summary: ClassVar[str] = "to give a picture its label"
    kinds: ClassVar[tuple[str, ...]] = ("image-classification",)

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Table:
        given = reading.text_columns[0] if reading.text_columns else None

        def find(cells: Cells) -> dict[str, str]:
            picture = column_of(cells, "picture", PICTURE, given, "--text-column")
            return {
                "picture": picture,
                "label": column_of(cells, "label", LABEL, reading.label_column, "--label-column"),
            }

        tables = []
        for source in sources:
            folder = Path(source).expanduser()
            if folder.is_dir() and _has_pictures(folder):
                tables.append(_from_folders(folder, "test" if held_out else "train"))
                continue
            most = reading.max_bad_rows
            tables.append(read_beside(source, find, _checked, held_out=held_out, max_bad_rows=most))
        return joined(tables)

    def length(self, positions: int, most: int) -> int:
        return most  # a picture has as many patches as its processor makes of it

    def encode(self, data: Table, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        labels = Labels(config)
        targets = [labels.target(row["label"], where) for row, where in zip(data.rows, data.where, strict=True)]
        pictures = Pictures([row["picture"] for row in data.rows], targets, data.where, prepare)
        first = f"{data.where[0]} -> {data.rows[0]['label']}"
        tally = Counter(loss=len(pictures))
        return encoded(self.name, data, pictures, length=length, tally=tally, unit="labels", example=first)

    def collator(self, prepare: Any, model: Any) -> Collate:
        from transformers import default_data_collator

        def collate(examples: Sequence[Any]) -> Mapping[str, Any]:
            found: Mapping[str, Any] = default_data_collator(list(examples))
            return found

        return collate


@dataclass(frozen=True)
class Pictures:
    """Pictures with what a model is to say of them; each is opened and prepared when it is asked for."""

    pictures: Sequence[Any]
    """Each as a path, or as bytes."""

    targets: Sequence[Any]
    """What a model is to say of each."""

    where: Sequence[str]
    """Where each stands, for errors."""

    prepare: Any
    """The image processor of the model."""

    column_names: ClassVar[list[str]] = ["pixel_values", "labels"]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, at: int) -> dict[str, Any]:
        """`pixel_values` `[channels, height, width]` and `labels` of a picture.

        Raises:
            DataError: It cannot be opened.
        """
        picture = opened(self.pictures[at], self.where[at])
        values: Tensor = self.prepare(images=[picture], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": values, "labels": self.targets[at]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[at] for at in range(len(self)))

    def select(self, indices: Sequence[int]) -> Pictures:
        """Some of the pictures, in the order of `indices`."""
        some = [int(at) for at in indices]
        pictures, targets, where = ([each[at] for at in some] for each in (self.pictures, self.targets, self.where))
        return Pictures(pictures, targets, where, self.prepare)


def _has_pictures(folder: Path) -> bool:
    """Whether a folder has pictures in folders below it, and no table that names them."""
    suffixes = set(pillow().registered_extensions())
    files = [file for file in folder.rglob("*") if file.is_file()]
    return any(file.suffix.lower() in suffixes for file in files) and not any(
        file.suffix.lower() in (".csv", ".jsonl", ".json", ".parquet", ".arrow") for file in files
    )


def _from_folders(folder: Path, split: str) -> Table:
    """The pictures of a split, each with the name of the folder that it lies in, as `datasets` reads such folders.

    Raises:
        DataError: There are none of that split, or all of them lie in one folder.
    """
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        every = load_dataset("imagefolder", data_dir=str(folder), drop_labels=False)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read as a folder of pictures ({error})") from error
    if split == "test" and "test" not in every and len(every) == 1:
        split = next(iter(every))  # a folder without splits is one body of data
    if split not in every:
        raise DataError(f"{folder}: has no split {split!r}. It has {', '.join(map(str, every))}")
    data = every[split].cast_column("image", Image(decode=False))
    names = data.features["label"].names
    pictures = [cell["path"] or cell["bytes"] for cell in data["image"]]
    rows: list[Cells] = [
        {"picture": picture, "label": names[label]} for picture, label in zip(pictures, data["label"], strict=True)
    ]
    where = [
        str(picture) if isinstance(picture, str) else f"{folder} row {at}" for at, picture in enumerate(pictures, 1)
    ]
    return Table(rows, where, str(folder), {"picture": "image", "label": "label"}, bad=BadRows(good=len(rows)))


def _checked(cells: Cells, folder: Path) -> Cells:
    return {"picture": picture_of(cells["picture"], folder), "label": label_cell(cells["label"])}
