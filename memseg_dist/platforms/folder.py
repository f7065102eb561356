"""Pictures and tables as files of the run's own directory, whatever else tracks the run."""

from __future__ import annotations

import io

import fsspec
import numpy as np
from PIL import Image

from memseg_dist.train.platform import Tracker, picture_path


class FolderTracker(Tracker):
    """log_image("panels/00", ..., 100) -> DIRECTORY/panels/step-00000100/00.png; texts by name."""

    def __init__(self, directory: str) -> None:
        self._directory = directory.rstrip("/")
        self._has_failed = False

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        self._write(picture_path(name, step), buffer.getvalue())

    def log_text(self, name: str, text: str) -> None:
        self._write(name, text.encode())

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self._directory}/{name}"
        try:
            with fsspec.open(path, "wb", auto_mkdir=True) as file:
                file.write(content)
        except Exception as error:  # noqa: BLE001 - a full disk must not end the training
            if not self._has_failed:
                print(f"cannot write {path}: {error}; training goes on", flush=True)
            self._has_failed = True
