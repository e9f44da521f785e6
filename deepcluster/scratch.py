"""Arrays that may be larger than memory: a large one lies in a file without a name, on the disk of the cache."""

import os
import tempfile

import numpy as np

from deepcluster import doctor

SMALL = 1 << 28  # bytes up to which an array is in memory


def zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """An array of zeros; if it is large, mapped from a file that is gone as soon as the array is.

    The kernel then writes it out and drops it whenever memory is wanted for something else. Where the disk has no room
    for it, it is in memory after all.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size > SMALL:
        folder = doctor.cache_dir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # or a disk that fills up would kill this process
                    os.posix_fallocate(file.fileno(), 0, size)
                return np.asarray(np.memmap(file, dtype, "r+" if hasattr(os, "posix_fallocate") else "w+", shape=shape))
        except OSError:
            pass
    return np.zeros(shape, dtype)
