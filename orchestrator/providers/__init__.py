"""The clouds that machines are rented from; a new one is a file here and a line in this table."""

from __future__ import annotations
