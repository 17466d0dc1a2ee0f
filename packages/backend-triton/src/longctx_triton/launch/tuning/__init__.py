"""Tiles from tables: the user's for this GPU, then the package's, then the code's own choice."""

from longctx_triton.launch.tuning.lookup import Question, asked, forced, tuned
from longctx_triton.launch.tuning.places import shipped_table, triton_version, user_table
from longctx_triton.launch.tuning.table import (
    Entry,
    Key,
    Table,
    TableError,
    Value,
    read_table,
    store,
)

__all__ = [
    "Entry",
    "Key",
    "Question",
    "Table",
    "TableError",
    "Value",
    "asked",
    "forced",
    "read_table",
    "shipped_table",
    "store",
    "triton_version",
    "tuned",
    "user_table",
]
