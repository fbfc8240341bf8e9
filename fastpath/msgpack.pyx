cdef bint skip(Reader* reader, int depth) noexcept nogil:
    """Move past one value of an event, within ``depth`` containers; return whether its structure decodes."""
    cdef Value value
    cdef uint64_t _i, count
    if depth > MAXIMUM_DEPTH:
        return False
    if read_head(reader, &value) == TYPE_NONE:
        return False
    if value.type == TYPE_TEXT or value.type == TYPE_OTHER:
        reader.at += value.size
    elif value.type == TYPE_ARRAY or value.type == TYPE_MAP:
        count = value.size if value.type == TYPE_ARRAY else 2 * value.size
        for _i in range(count):
            if not skip(reader, depth + 1):
                return False
    return True


cdef bint pass_over(Reader* reader, uint64_t count) noexcept nogil:
    """Move past ``count`` values, however deep they nest; return whether their structure decodes."""
    cdef Value value
    while count:
        # Each takes a byte at least: no number that is written down makes this go on for longer than there are bytes.
        if count > <uint64_t>(reader.end - reader.at) or read_head(reader, &value) == TYPE_NONE:
            return False
        count -= 1
        if value.type == TYPE_TEXT or value.type == TYPE_OTHER:
            reader.at += value.size
        elif value.type == TYPE_ARRAY:
            count += value.size
        elif value.type == TYPE_MAP:
            count += 2 * value.size
    return True
