"""What the footers and the labels of parquet files of images say. Importing this loads no pyarrow."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data import SetError
from data.samples.listing import first_few
from data.tooling.limits import TOO_MANY_FILES, too_many_open_files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AGAIN = "download or copy it again"


@dataclass(frozen=True)
class ParquetFile:
    """What the footer and the label column of one file say.

    Attributes:
        rows: Number of rows of each row group.
        group_bytes: Bytes of the images of each row group, unpacked.
        labels: Label of each row, as in the file.
        class_names: Names of the classes; empty if the file does not hold them.
        column: Name of the column of encoded images.
        size: Size of the file in bytes.
    """

    rows: list[int]
    group_bytes: list[int]
    labels: NDArray[np.int64]
    class_names: list[str]
    column: str
    size: int


def import_parquet() -> Any:
    """Return the module pyarrow.parquet.

    Raises:
        SetError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SetError("parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def class_names_of(metadata: dict[bytes, bytes] | None) -> list[str]:
    """Return the names of the classes that Hugging Face's metadata hold; [] without them."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def look_at(path: str) -> ParquetFile:
    """Read the footer and the labels of one file.

    Raises:
        SetError: It cannot be read, or lacks a column.
    """
    parquet = import_parquet()
    try:
        with parquet.ParquetFile(path) as file:
            schema, footer = file.schema_arrow, file.metadata
            column = _image_column(path, schema)
            groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
            leaf = [footer.schema.column(i).path for i in range(footer.num_columns)].index(column)
            labels = file.read(columns=["label"]).column("label")
            if labels.null_count:
                raise SetError(f"{path}: {labels.null_count} rows have no label")
            return ParquetFile(
                [group.num_rows for group in groups],
                [group.column(leaf).total_uncompressed_size for group in groups],
                labels.to_numpy().astype("int64"),
                class_names_of(schema.metadata),
                column,
                os.path.getsize(path),
            )
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise too_many_open_files() from error
        raise SetError(f"{path} cannot be read ({error}); {AGAIN}") from error
    except SetError:
        raise
    except Exception as error:  # damage can raise anything
        raise SetError(f"{path} is damaged or no parquet file ({error}); {AGAIN}") from error


def _image_column(path: str, schema: Any) -> str:
    """Return the name of the column of encoded images: ``image`` or ``image.bytes``."""
    import pyarrow.types as types

    found = f"{path} has the columns {first_few([f'{f.name} ({f.type})' for f in schema])}"
    if "image" not in schema.names or "label" not in schema.names:
        raise SetError(f"{found}; a set of images has the columns image and label")
    if not types.is_integer(schema.field("label").type):
        raise SetError(f"{found}; label must be an integer")
    image = schema.field("image").type
    if types.is_binary(image) or types.is_large_binary(image):
        return "image"
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        return "image.bytes"
    raise SetError(f"{found}; image must be bytes, or a struct of bytes and path")
