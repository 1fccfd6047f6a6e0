"""Features as a Parquet table (optional extra ``parquet``)."""

import importlib.util
import os
from pathlib import Path

from dino_lightning.tools.feature_folder import read_features

_ROWS = 8192  # of a row group


def check_pyarrow() -> None:
    """Raises ModuleNotFoundError without pyarrow, saying how to install it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ModuleNotFoundError("parquet needs pyarrow: pip install pyarrow", name="pyarrow")


def write_parquet(folder: Path) -> None:
    """``features.parquet`` beside the features (N, D) of a folder: columns path (string) and feature (list of D floats)."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    features, paths, _ = read_features(folder)
    width = features.shape[1]
    schema = pyarrow.schema({"path": pyarrow.string(), "feature": pyarrow.list_(pyarrow.float32(), width)})
    new = folder / ".features.parquet.partial"
    with ParquetWriter(new, schema) as writer:
        for start in range(0, len(paths), _ROWS):
            rows = slice(start, start + _ROWS)
            vectors = pyarrow.FixedSizeListArray.from_arrays(features[rows].flatten().numpy(), width)
            writer.write_table(pyarrow.table([pyarrow.array(paths[rows]), vectors], schema=schema))
    os.replace(new, folder / "features.parquet")
