"""A loyalty accrual engine: order events in, points decided, ledger committed exactly once.

The stages, in the order an event meets them::

    client      the order pipeline's producer: validates, encodes, batches, delivers
    stream      the Redis/Valkey side: keys, connections, the commit script
    events      the table every event obeys, and its encodings
    rulebook    earning rules, campaigns and limits, checked
    outcomes    what is said of an event: entries, duplicates, dead letters
    engine      the decision: the compiled fast path and the plain reference
    ledger      batches of entries, columnar, chained by digest
    snapshots   the state in a file, from which a restart goes on
    worker      reads, decides, commits; owns one partition
    cli         the commands
"""

__version__ = "0.1.0"
