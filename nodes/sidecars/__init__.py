"""Keeps what was learned of a checkpoint in a file, its sidecar, and finds the file again when the checkpoint is sampled.

`folder` is where they lie, `lookup` finds the one of a loaded model, `calibrations` is what nodes use. `calibrating` makes new ones; it
samples, so it stands on the host's room and is not imported here.
"""

from .fingerprints import belongs, fingerprint_of
from .folder import FOLDER, default_path, make_folder, names, path_of, register, save, state, state_of
from .lookup import find

__all__ = [
    "FOLDER", "belongs", "default_path", "find", "fingerprint_of", "make_folder", "names", "path_of", "register", "save", "state",
    "state_of",
]  # fmt: skip
