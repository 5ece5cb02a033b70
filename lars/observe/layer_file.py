"""The values of every layer in the run folder: a file that grows during training, and a Parquet file afterwards.

Both hold the same table, with one row for each reading and layer:

============== ============ ===========================================================================
column         type         meaning
============== ============ ===========================================================================
step           int32        optimizer step, counted from 1
layer          dictionary   name of the parameter
kind           dictionary   "adapted", or "excluded" from the trust ratio
weight_norm    float32      ‖w‖ before the step
grad_norm      float32      ‖g‖ as the optimizer received it, after the exchange and the clipping
trust_ratio    float32      what multiplied the update; 1 without a trust ratio, nan if it is not known
update_ratio   float32      ‖Δw‖ / ‖w‖
============== ============ ===========================================================================
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from lars.errors import CheckpointError
from lars.observe.output import GrowingFile, say
from lars.run.files import atomic_write

GROWING, FINISHED = "layers.arrow", "layers.parquet"
QUANTITIES = ("weight_norm", "grad_norm", "trust_ratio", "update_ratio")
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("layer", pa.dictionary(pa.int16(), pa.string())),
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        *((name, pa.float32()) for name in QUANTITIES),
    ]
)
KINDS = ("adapted", "excluded")


@dataclass
class LayerHistory:
    """The values of every layer over a run.

    Attributes:
        steps: The optimizer steps that were read, an int array of shape (readings,).
        layers: Names of the parameters, in the order of the network.
        kinds: "adapted" or "excluded" for each of them.
        values: float32 array of shape (readings, quantities, layers). `QUANTITIES` names the quantities.
    """

    steps: np.ndarray
    layers: list[str]
    kinds: list[str]
    values: np.ndarray

    def __getitem__(self, quantity: str) -> np.ndarray:
        """One quantity, of shape (readings, layers), for example a heat map of ``history["trust_ratio"]``."""
        return self.values[:, QUANTITIES.index(quantity)]


def read(folder: Path | str) -> LayerHistory:
    """Read the values of every layer of a run, which may still be training.

    Args:
        folder: The run folder.

    Raises:
        FileNotFoundError: The run has no such values.

    Example:
        history = read("logs/imagenet/RUN")
        history["trust_ratio"][:, history.layers.index("fc.weight")]  # over history.steps
    """
    table = _stored(Path(folder))
    if table is None or len(table) == 0:
        raise FileNotFoundError(
            f"{folder} holds no values of layers: neither {FINISHED} nor {GROWING} has any; "
            "a run writes them if --layers-every is not 0"
        )
    return _history(table)


def _stored(folder: Path) -> pa.Table | None:
    """The table in the run folder, without an incomplete last reading. None if there is no file."""
    if (folder / FINISHED).exists():
        return parquet.read_table(folder / FINISHED, schema=SCHEMA)
    if not (folder / GROWING).exists():
        return None
    batches = []
    try:
        with pa.OSFile(str(folder / GROWING)) as file, pa.ipc.open_stream(file) as stream:
            batches.extend(stream)
    except (pa.ArrowInvalid, OSError):  # a killed job left half a reading
        pass
    return pa.Table.from_batches(batches, SCHEMA)


def _history(table: pa.Table) -> LayerHistory:
    steps = table["step"].to_numpy()
    layers = int((steps == steps[0]).sum())
    columns = [table[name].to_numpy().reshape(-1, layers) for name in QUANTITIES]
    names, kinds = (table[name].slice(0, layers).to_pylist() for name in ("layer", "kind"))
    return LayerHistory(steps[::layers], names, kinds, np.stack(columns, axis=1))


class LayerFile:
    """Writes the readings of a run.

    The growing file is an Arrow stream, to which every reading adds a complete piece. After a kill, a resumed run keeps
    the readings up to its checkpoint and repeats the later ones. So there are neither gaps nor doubles.
    """

    def __init__(self, folder: Path, layers: list[str], kinds: list[str]) -> None:
        """Write to the run folder `folder`. Nothing is written yet.

        Args:
            folder: The run folder.
            layers: The names of the layers.
            kinds: "adapted" or "excluded" for each layer.
        """
        self.folder, self.layers = folder, layers
        self.columns = [
            pa.DictionaryArray.from_arrays(pa.array(range(len(layers)), pa.int16()), layers),
            pa.DictionaryArray.from_arrays(pa.array(map(KINDS.index, kinds), pa.int8()), KINDS),
        ]
        self.file = GrowingFile(folder / GROWING)
        self.piece = io.BytesIO()
        self.stream = pa.ipc.new_stream(self.piece, SCHEMA)

    def restart(self, step: int) -> LayerHistory | None:
        """Keep the readings of this run up to optimizer step `step`, and return them if there are any.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        history = self._earlier(step)
        try:
            with atomic_write(self.file.path) as file:
                if history is not None:
                    for at, values in zip(history.steps, history.values, strict=True):
                        file.write(self._encoded(int(at), values))
            (self.folder / FINISHED).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"--log-dir: {self.file.path} cannot be written: {error}"
            ) from error
        return history

    def _earlier(self, step: int) -> LayerHistory | None:
        try:
            table = _stored(self.folder)
        except (pa.ArrowException, OSError) as error:
            say(f"warning: {self.folder / FINISHED} cannot be read and is replaced: {error}")
            return None
        if table is None or not len(table) or table["step"][0].as_py() > step:
            return None
        found = _history(table)
        if found.layers != self.layers:
            say(f"warning: {self.folder} holds values of other layers, which are replaced")
            return None
        kept = int((found.steps <= step).sum())
        return LayerHistory(found.steps[:kept], found.layers, found.kinds, found.values[:kept])

    def add(self, step: int, values: np.ndarray) -> None:
        """Append a reading: the values of shape (quantities, layers) at optimizer step `step`."""
        self.file.add(self._encoded(step, values))

    def _encoded(self, step: int, values: np.ndarray) -> bytes:
        steps = pa.array(np.full(len(self.layers), step, np.int32))
        columns = [steps, *self.columns, *map(pa.array, values)]
        self.stream.write_batch(pa.record_batch(columns, schema=SCHEMA))
        piece = self.piece.getvalue()
        self.piece.seek(0)
        self.piece.truncate()
        return piece

    def retry(self) -> None:
        """Write what could not be written earlier."""
        self.file.add(b"")

    def finish(self) -> None:
        """Replace the growing file by a Parquet file. If that fails, the growing file stays."""
        self.retry()
        if self.file.waiting:
            return
        try:
            with atomic_write(self.folder / FINISHED) as file:
                parquet.write_table(_stored(self.folder), file)
            self.file.path.unlink()
        except OSError as error:
            say(
                f"warning: {self.folder / FINISHED} cannot be written: {error}; {GROWING} holds the values"
            )
