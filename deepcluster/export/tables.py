"""Features with what is known of their images: NumPy, Parquet, safetensors. Written row by row, never held whole."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepcluster import __version__, atomic
from deepcluster.export.task import ROWS, Images, Task, warn
from deepcluster.landscape import Landscape, landscape_of

NAMES = ".names.json"
GROUP = 1 << 26  # bytes of images in a row group at most, but for one image that is larger
HEADER = 90_000_000  # bytes; readers of safetensors refuse more than 100 MB


def npy(task: Task) -> str:
    """FILE.npy, and the paths in FILE.names.json: a list in the same order, since a path may hold any letter."""
    n, dim = task.features.shape
    with task.new.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n, dim)})
        for block in task.blocks():
            file.write(block.data)
    beside = task.new.with_suffix(NAMES)
    atomic.write_json(beside, task.names)
    return f"{n} rows of {dim} features, their paths in {beside.name}"


def safetensors(task: Task) -> str:
    """Tensors `cluster` and `features`; metadata `names` (JSON list), `clusters` (JSON, id -> name), `version`."""
    n, dim = task.features.shape
    clusters = {str(c): name for c, name in task.clusters().items()}
    metadata = {"names": json.dumps(task.names), "clusters": json.dumps(clusters), "version": __version__}
    layout: dict[str, Any] = {
        "__metadata__": metadata,
        "cluster": {"dtype": "I64", "shape": [n], "data_offsets": [0, 8 * n]},
        "features": {"dtype": "F32", "shape": [n, dim], "data_offsets": [8 * n, 8 * n + 4 * n * dim]},
    }
    header = json.dumps(layout).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > HEADER:
        raise ValueError(f"the paths of {n} images do not fit in a safetensors file; use --format parquet or npy")
    with task.new.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(task.table["cluster"].to_numpy().astype("<i8").data)
        for block in task.blocks():
            file.write(block.data)
    return f"{n} rows of {dim} features with their paths"


def parquet(task: Task) -> str:
    """The columns of assignments.parquet, and

    features (D floats), projection_x and projection_y in [-1, 1], neighbors {ids: zero-based rows, distances: cosine},
    image {bytes: of the file as it is, or a PNG of pixels; null if they are gone, path}.
    """
    n, dim = task.features.shape
    found, images = landscape_of(task.run), task.images_if_any("the export has paths instead of images")
    fields = [
        ("features", pa.list_(pa.float32(), dim)),
        ("projection_x", pa.float32()),
        ("projection_y", pa.float32()),
        ("neighbors", pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
    schema = pa.schema([*task.table.schema, *(pa.field(*field) for field in fields)])
    plain = [name for name in schema.names if name not in ("features", "projection_x", "projection_y", "image", "sha1")]
    with task.new.open("wb") as file, pq.ParquetWriter(file, schema, use_dictionary=plain) as writer:
        for start, pictures in _groups(images, n):
            rows = slice(start, start + len(pictures))
            part = task.table.slice(start, len(pictures))
            writer.write_table(
                pa.Table.from_arrays([*part.columns, *_added(task, found, rows, pictures)], schema=schema)
            )
    if images and images.lost:
        warn(f"{images.lost} of {n} images cannot be read any more or are others now; they have a path only")
    return f"{n} rows of {dim} features with map, neighbours and {'images' if images else 'paths'}"


def _groups(images: Images | None, n: int) -> Iterator[tuple[int, list[bytes | None]]]:
    """(first row, bytes of the images from there on), for one row group after the other."""
    start, size = 0, 0
    group: list[bytes | None] = []
    for row in range(n):
        data = images.data(row) if images else None
        if group and (len(group) == ROWS or size + len(data or b"") > GROUP):
            yield start, group
            start, size, group = row, 0, []
        group.append(data)
        size += len(data or b"")
    yield start, group


def _added(task: Task, found: Landscape, rows: slice, pictures: list[bytes | None]) -> list[pa.Array]:
    """The columns that assignments.parquet does not have."""
    features = np.ascontiguousarray(task.features[rows], np.float32)
    ids, distances = found.neighbours[rows], found.distances[rows]
    offsets = pa.array(np.arange(len(ids) + 1) * ids.shape[1], pa.int32())
    neighbours = [
        pa.ListArray.from_arrays(offsets, pa.array(ids.ravel(), pa.int64())),
        pa.ListArray.from_arrays(offsets, pa.array(distances.ravel(), pa.float32())),
    ]
    image = [pa.array(pictures, pa.binary()), task.table["path"][rows].combine_chunks()]
    return [
        pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1]),
        pa.array(found.positions[rows, 0]),
        pa.array(found.positions[rows, 1]),
        pa.StructArray.from_arrays(neighbours, ["ids", "distances"]),
        pa.StructArray.from_arrays(image, ["bytes", "path"]),
    ]
