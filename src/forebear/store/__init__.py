"""Rows on disk, one for each training example: safetensors shards and a JSON manifest."""

from forebear.store.builder import ShardWriter, StoreBuilder
from forebear.store.export import to_npy, to_parquet
from forebear.store.manifest import Column, Manifest
from forebear.store.merge import merge
from forebear.store.reader import Block, Store
from forebear.store.rows import decode
from forebear.store.verify import Verification, verify

__all__ = [
    "Block",
    "Column",
    "Manifest",
    "ShardWriter",
    "Store",
    "StoreBuilder",
    "Verification",
    "decode",
    "merge",
    "to_npy",
    "to_parquet",
    "verify",
]
