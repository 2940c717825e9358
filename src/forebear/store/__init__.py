"""Rows on disk, one for each training example: safetensors shards and a JSON manifest."""

from forebear.store.builder import StoreBuilder
from forebear.store.export import to_npy, to_parquet
from forebear.store.manifest import Column, Manifest
from forebear.store.merge import merge
from forebear.store.reader import Block, Store
from forebear.store.verify import Verification, verify

__all__ = [
    "Block",
    "Column",
    "Manifest",
    "Store",
    "StoreBuilder",
    "Verification",
    "merge",
    "to_npy",
    "to_parquet",
    "verify",
]
