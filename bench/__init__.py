"""Benchmarks: every figure beside its ceiling or its peer, measured in the same run (README.md in this folder).

::

    rows       byte strings by the thousand, without a Python object for each
    workload   the standard workload as columns, compact events and JSON
    wire       the same as XREAD replies and as XADD commands
    machine    where it runs: description, pinning, page faults, huge pages
    report     figures, their noise, the table and the JSON file
    core       the compiled core alone, stage by stage
    drain      the worker end to end, against the raw XREAD ceiling and the peer
    peer_lua   the peer: redis-py and one Lua call per event
    running    what runs beside a measurement: a server, and a worker whose log is read
    latency    from append to committed under open-loop load, with and without snapshots
    restart    memory, snapshot, restart and replay of a large state
    growth     what an event costs in each tenth of a long stream
    book       the ledger into the book, against bare COPY; settlement
    profile    what an event costs in instructions and cache misses, by valgrind
    jobs       a large settlement and a large expiry: speed, memory, locks, and what others notice
    audit      deciding a ledger again, and beginning in the middle of one
"""
