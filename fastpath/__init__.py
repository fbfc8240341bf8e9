"""The compiled fast path, in the order an event meets it.

    resp      a reply's bytes, scanned into stream entries
    decode    an entry's MessagePack, checked and hashed into events
    table     what is remembered: ids, members and counters, on huge pages
    decide    SPEC section 4, one loop over a batch
    encode    the decisions as one ledger batch
    core      the class that owns it all; the only thing Python sees beside the reply reader

Nothing here imports the rest of the project, reads a clock or draws a number.
"""
