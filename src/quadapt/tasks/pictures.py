"""Pictures in data: as files, as bytes, or as they lie in a dataset; found beside the rows that name them."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quadapt.data.bad import BadRows
from quadapt.data.messages import describe
from quadapt.data.tables import Cells, Table, read_table
from quadapt.errors import DataError, ResourceError

PICTURE = ("image", "picture", "img", "file_name", "path")
"""The names under which a picture is looked for, the usual one first."""


def pillow() -> Any:
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


def picture_of(cell: Any, folder: Path) -> Any:
    """A picture as it is kept until it is needed: the path of a file, bytes, or a picture of Pillow's.

    Args:
        cell: One of these; a path may be relative to the folder. Also `{"bytes": .., "path": ..}`, as datasets have
            it, and `data:image/png;base64,..`.
        folder: Where the file with the rows lies.

    Raises:
        DataError: It is something else, or names a file that is not there.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path") or cell.get("url")
    if isinstance(cell, str) and cell.startswith("data:"):
        try:
            return base64.b64decode(cell.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise DataError(f"has a picture in base64 that is damaged ({error}). Write it anew") from error
    if isinstance(cell, str) and cell.startswith(("http://", "https://")):
        raise DataError(f"names the picture {cell}, and nothing is fetched. Download it, and write its path")
    if isinstance(cell, str) and cell:
        path = Path(cell.removeprefix("file://")).expanduser()
        path = path if path.is_absolute() else folder / path
        if not path.is_file():
            raise DataError(f"names the picture {path}, which is not there")
        return str(path)
    if cell is None or cell == "":
        raise DataError("has no picture. Delete the row")
    if not isinstance(cell, (bytes, pillow().Image)):
        raise DataError(f"has {describe(cell)} for a picture. It must be a path, or the bytes of a file")
    return cell


def opened(picture: Any, where: str) -> Any:
    """A picture in three colours.

    Raises:
        DataError: It is not there, or damaged.
    """
    module = pillow()
    try:
        if isinstance(picture, module.Image):
            return picture.convert("RGB")
        with module.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as found:
            return found.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: the picture cannot be opened ({error}). Delete the row, or write it anew") from error


def read_beside(
    source: str,
    find: Callable[[Cells], dict[str, str]],
    check: Callable[[Cells, Path], Cells],
    *,
    held_out: bool,
    max_bad_rows: int | None,
) -> Table:
    """Read rows that name pictures, as :func:`quadapt.data.tables.read_table` does.

    Args:
        source: A file, a folder or a name of the hub.
        find: Gives the column of each meaning, for the first row.
        check: Gives a row's cells as they are used, for the folder in which its pictures are looked for.
        held_out: Read the split `test` of what has splits.
        max_bad_rows: How many rows that cannot be used are skipped.
    """
    given = Path(source).expanduser()
    folder = given if given.is_dir() else given.parent
    return read_table([source], find, lambda cells: check(cells, folder), held_out=held_out, max_bad_rows=max_bad_rows)


def joined(tables: Sequence[Table]) -> Table:
    """Several tables put together as one."""
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
