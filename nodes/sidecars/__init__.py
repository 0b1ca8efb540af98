"""Keeps the calibration of a checkpoint in a file, its sidecar, and finds the file when the checkpoint is sampled.

`folder` knows where the files are, `lookup` finds the one of a loaded model, and `calibrations` is for the nodes. `calibrating` makes new
ones. It samples, so it needs `nodes.host` and is not imported here.
"""

from .fingerprints import belongs, fingerprint_of
from .folder import FOLDER, default_path, make_folder, names, path_of, register, save, state, state_of
from .lookup import find

__all__ = [
    "FOLDER", "belongs", "default_path", "find", "fingerprint_of", "make_folder", "names", "path_of", "register", "save", "state",
    "state_of",
]  # fmt: skip
