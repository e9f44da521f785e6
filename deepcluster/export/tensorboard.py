"""A folder for TensorBoard's embedding projector: ``tensorboard --logdir FOLDER``."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from deepcluster import decode, outputs
from deepcluster.export.task import Images, Task, warn

MOST = 10_000  # images: above, the projector becomes unusable
LARGEST = 8192  # pixels of a side of the sprite: what a browser takes as one texture
SIDE = 64  # pixels of a thumbnail at most
COLUMNS = ("path", "cluster", "name", "probability", "distance", "is_outlier", "is_junk")
CONFIG = """embeddings {{
  tensor_name: "features"
  tensor_path: "tensors.tsv"
  metadata_path: "metadata.tsv"
{sprite}}}
"""
SPRITE = """  sprite {{
    image_path: "sprite.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
"""


def projector(task: Task) -> str:
    """tensors.tsv, metadata.tsv, sprite.png (if there are images) and projector_config.pbtxt.

    Of more than MOST images an even sample.
    """
    n, dim = task.features.shape
    rows = np.linspace(0, n - 1, min(n, MOST)).round().astype(int)
    with (task.new / "tensors.tsv").open("w", encoding="ascii") as file:
        for row in rows:
            file.write("\t".join(f"{value:.6g}" for value in task.features[row]) + "\n")
    table = task.table.select([name for name in COLUMNS if name in task.table.column_names]).take(rows)
    with (task.new / "metadata.tsv").open("w", encoding="utf-8", newline="") as file:
        file.write("\t".join(table.column_names) + "\n")
        for values in zip(*(column.to_pylist() for column in table.columns), strict=True):
            file.write("\t".join(_cell(value) for value in values) + "\n")
    images = task.images_if_any("the projector shows points instead of images")
    sprite = SPRITE.format(side=_sprite(task.new / "sprite.png", images, rows)) if images else ""
    (task.new / "projector_config.pbtxt").write_text(CONFIG.format(sprite=sprite), encoding="ascii")
    if images and images.lost:
        warn(f"{images.lost} of {len(rows)} images cannot be read any more; their thumbnails are grey")
    some = f" (an even sample of {n})" if len(rows) < n else ""
    return f"{len(rows)} points{some} of {dim} features, for tensorboard --logdir"


def _cell(value: object) -> str:
    """One line without tabs, and no formula: see ``outputs.cell``."""
    text = f"{value:.4f}" if isinstance(value, float) else outputs.cell(value) if isinstance(value, str) else str(value)
    for letter, shown in (("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(letter, shown)
    return text


def _sprite(path: Path, images: Images, rows: np.ndarray) -> int:
    """All thumbnails in one square picture, row by row, as the projector expects; returns the side of one in pixels."""
    across = math.ceil(math.sqrt(len(rows)))
    side = min(SIDE, LARGEST // across)
    sheet = np.full((across * side, across * side, 3), 128, np.uint8)
    for i, row in enumerate(rows.tolist()):
        item = images.item(row)
        if item is None:
            continue
        y, x = divmod(i, across)
        try:
            pixels = decode.decode(item, side, 3)
        except decode.BadImage:
            images.lost += 1
            continue
        sheet[y * side : (y + 1) * side, x * side : (x + 1) * side] = pixels.transpose(1, 2, 0)
    with path.open("wb") as file:
        Image.fromarray(sheet).save(file, "png")
    return side
