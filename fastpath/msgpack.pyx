cdef inline bint skip_head(Reader* reader, uint64_t* inside) noexcept nogil:
    """Move past one value but for the ``inside`` values that it contains; return whether it decodes."""
    cdef Value value
    inside[0] = 0
    if read_head(reader, &value) == TYPE_NONE:
        return False
    if value.type == TYPE_TEXT or value.type == TYPE_OTHER:
        reader.at += value.size
    elif value.type == TYPE_ARRAY:
        inside[0] = value.size
    elif value.type == TYPE_MAP:
        inside[0] = 2 * value.size
    return True


cdef bint skip(Reader* reader, int depth) noexcept nogil:
    """Move past one value of an event, within ``depth`` containers; return whether its structure decodes."""
    cdef uint64_t _i, inside
    if depth > MAXIMUM_DEPTH or not skip_head(reader, &inside):
        return False
    for _i in range(inside):
        if not skip(reader, depth + 1):
            return False
    return True


cdef bint pass_over(Reader* reader, uint64_t count) noexcept nogil:
    """Move past ``count`` values, however deep they nest; return whether their structure decodes."""
    cdef uint64_t inside
    while count:
        # Each takes a byte at least: no number that is written down makes this go on for longer than there are bytes.
        if count > <uint64_t>(reader.end - reader.at) or not skip_head(reader, &inside):
            return False
        count += inside - 1
    return True
