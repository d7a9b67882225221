"""Saves and loads any torch trainer's state through `torch.distributed.checkpoint`.

    from storage import dcp as holdfast

`StorageWriter` and `StorageReader` go where `FileSystemWriter` and `FileSystemReader` would; with
`AsyncStager` for `async_save`. What is written is a checkpoint like any other (FORMAT.md), in any
store, and can be loaded in any layout. More: docs/dcp.md.
"""

from storage.dcp.reader import StorageReader
from storage.dcp.stager import AsyncStager
from storage.dcp.target import agree_epoch
from storage.dcp.writer import StorageWriter

__all__ = ["AsyncStager", "StorageReader", "StorageWriter", "agree_epoch"]
