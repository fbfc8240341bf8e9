"""The order pipeline's producer: validates, encodes, batches, delivers, and tells what was taken.

``AsyncProducer`` is for asyncio, ``Producer`` for threads. Teams that write another language find all that
they need in docs/PROTOCOL.md. The modules, in the order an event meets them::

    options     settings with their bounds
    outbox      encoding, batches, the bound on what waits; no I/O
    sender      round trips, retries, confirmation
    link        the connection; which refusals pass
    producer    the asyncio face
    blocking    the face for threads
"""

from accrual.client.blocking import Delivery, Producer
from accrual.client.options import Confirmation, Options
from accrual.client.outbox import Receipt
from accrual.client.producer import AsyncDelivery, AsyncProducer

__all__ = ["AsyncDelivery", "AsyncProducer", "Confirmation", "Delivery", "Options", "Producer", "Receipt"]
