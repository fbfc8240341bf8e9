"""Files of ours somewhere: in a local directory, or in an object store. A URL says where.

::

    store       what a store can do, and which one a URL means
    directory   a directory on this machine
    objects     a bucket of an object store (extra ``object-store``)

A file appears whole or not at all, and never changes while somebody reads it.
"""

from accrual.blobs.store import BlobStore, open_store

__all__ = ["BlobStore", "open_store"]
