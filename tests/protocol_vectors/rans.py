"""The entropy coder of `klt`, one code at a time, as SPEC.md describes it."""

import struct


def table(reach, zeros, decay):
    return struct.pack("<HBB", reach, zeros, decay)


def count_lanes(rows, columns):
    return max(1, min(rows, 4096, rows * columns // 2048))


def slots(one_table):
    """Return [code, first slot, number of slots] of each code."""
    reach, zeros, decay = struct.unpack("<HBB", one_table)
    spare = 65536 - (2 * reach + 1)
    side = (spare - spare * zeros // 256) // 2 if reach else 0
    counts, rest = {0: 1 + spare - 2 * side}, side
    for magnitude in range(1, reach + 1):
        left = 0 if magnitude == reach else rest - rest * decay**2 // 65536
        counts[magnitude] = counts[-magnitude] = 1 + rest - left
        rest = left
    first, result = 0, []
    for code in range(-reach, reach + 1):
        result.append((code, first, counts[code]))
        first += counts[code]
    assert first == 65536
    return result


def places(rows, columns):
    """Yield row, column and lane in the order of decoding."""
    lanes = count_lanes(rows, columns)
    for start in range(0, rows, lanes):
        for column in range(columns):
            for row in range(start, min(start + lanes, rows)):
                yield row, column, row - start


def encode(matrix, tables):
    """Encode a list of rows; return the words as bytes."""
    columns = len(tables)
    models = [{code: (first, count) for code, first, count in slots(one)} for one in tables]
    states = [2**32] * count_lanes(len(matrix), columns)
    words = []
    for row, column, lane in reversed(list(places(len(matrix), columns))):
        first, count = models[column][matrix[row][column]]
        state = states[lane]
        if state >= count * 2**32:
            words.append(state % 65536)
            state //= 65536
        states[lane] = state // count * 65536 + first + state % count
    begin = [state >> shift & 0xFFFF for state in states for shift in (0, 16, 32)]
    return struct.pack(f"<{len(begin) + len(words)}H", *begin, *reversed(words))


def decode(data, rows, tables):
    """Decode a list of rows; return it, and the bytes that follow."""
    words = list(struct.unpack(f"<{len(data) // 2}H", data))
    columns = len(tables)
    models = [slots(one) for one in tables]
    states = []
    for _ in range(count_lanes(rows, columns)):
        states.append(words[0] + (words[1] << 16) + (words[2] << 32))
        del words[:3]
    matrix = [[0] * columns for _ in range(rows)]
    for row, column, lane in places(rows, columns):
        slot = states[lane] % 65536
        code, first, count = next(
            entry for entry in models[column] if entry[1] <= slot < entry[1] + entry[2]
        )
        matrix[row][column] = code
        states[lane] = count * (states[lane] // 65536) + slot - first
        if states[lane] < 2**32:
            states[lane] = states[lane] * 65536 + words.pop(0)
    assert states == [2**32] * len(states)
    return matrix, struct.pack(f"<{len(words)}H", *words)
