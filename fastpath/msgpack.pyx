cdef bint skip(Reader* reader, int depth) noexcept nogil:
    """Move past one value whatever it is; return whether its structure decodes."""
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
