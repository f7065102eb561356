"""Tiny pictures to write shards of."""

from pictures import options, picture_files, read_back  # noqa: F401
