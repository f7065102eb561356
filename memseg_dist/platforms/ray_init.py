"""How this package joins or starts a Ray cluster, for runs and for recipes."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray


def init_ray(**options: Any) -> None:
    """ray.init(**options) without a report to Ray's makers, nor a warning that tokens are on."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(**options)
