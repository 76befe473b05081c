"""Giving a picture its label: a folder of pictures for each label, or rows that name pictures and their labels."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from quadapt.data import Encoded
from quadapt.data.bad import BadRows
from quadapt.data.tables import Cells, Table, column_of, read_table
from quadapt.errors import DataError, ResourceError
from quadapt.tasks.base import TASKS, Collate, Reading
from quadapt.tasks.classifier import Classifier
from quadapt.tasks.examples import encoded
from quadapt.tasks.labels import LABEL, Labels, label_cell

PICTURE = ("image", "picture", "img", "file_name", "path")
"""The names under which a picture is looked for, the usual one first."""


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
            place = folder if folder.is_dir() else folder.parent
            tables.append(
                read_table(
                    [source],
                    find,
                    lambda cells, place=place: _checked(cells, place),  # type: ignore[misc]
                    held_out=held_out,
                    max_bad_rows=reading.max_bad_rows,
                )
            )
        return _joined(tables)

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
        picture = _opened(self.pictures[at], self.where[at])
        values: Tensor = self.prepare(images=[picture], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": values, "labels": self.targets[at]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[at] for at in range(len(self)))

    def select(self, indices: Sequence[int]) -> Pictures:
        """Some of the pictures, in the order of `indices`."""
        some = [int(at) for at in indices]
        pictures, targets, where = ([each[at] for at in some] for each in (self.pictures, self.targets, self.where))
        return Pictures(pictures, targets, where, self.prepare)


def _pillow() -> Any:
    """Pillow's module of pictures.

    Raises:
        ResourceError: It is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ResourceError(
            "pictures are opened with Pillow, which is not installed. Install it: pip install 'quadapt[images]'"
        ) from error
    return Image


def _opened(picture: Any, where: str) -> Any:
    """A picture in three colours.

    Raises:
        DataError: It is not there, or damaged.
    """
    module = _pillow()
    try:
        if isinstance(picture, module.Image):
            return picture.convert("RGB")
        with module.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: the picture cannot be opened ({error}). Delete the row, or write it anew") from error


def _has_pictures(folder: Path) -> bool:
    """Whether a folder has pictures in folders below it, and no table that names them."""
    suffixes = set(_pillow().registered_extensions())
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
    picture = cells["picture"]
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str) and not Path(picture).is_absolute():
        picture = str(folder / picture)
    if isinstance(picture, str) and not Path(picture).is_file():
        raise DataError(f"names the picture {picture}, which is not there")
    if picture is None:
        raise DataError("has no picture. Delete the row")
    return {"picture": picture, "label": label_cell(cells["label"])}


def _joined(tables: Sequence[Table]) -> Table:
    """Several tables as one."""
    if len(tables) == 1:
        return tables[0]
    bad = BadRows(tables[0].bad.most)
    for table in tables:
        bad.join(table.bad)
        bad.good += table.bad.good
    return Table(
        [row for table in tables for row in table.rows],
        [where for table in tables for where in table.where],
        ", ".join(table.source for table in tables),
        tables[0].columns,
        tuple(dict.fromkeys(note for table in tables for note in table.notes)),
        bad,
    )
