"""The worker of one partition. Its parts, from the outside in.

::

worker      owns the partition, recovers, works, gives it up
recovery    from the ledger back to a living engine
archived    the same with archived input, to see that it gives what was committed
pipeline    the main loop: read, decide, commit
memory      what the state may take
intake      from the events stream to decided batches
commits     batches on their way to the server
progress    what it tells of itself
trouble     what may be tried again, and how soon
tasks       tasks that live and end together
"""

from accrual.worker.worker import Worker

__all__ = ["Worker"]
