"""Writes metadata-only GGUF v3 files (ggml docs/gguf.md), enough for a tokenizer."""
import struct

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def _string(value):
    data = value if isinstance(value, bytes) else value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _scalar(kind, value):
    if kind == STRING:
        return _string(value)
    return struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}[kind], value)


def write(path, entries):
    """entries: list of (key, type, value); an array is (key, (ARRAY, type), values)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries))
    for key, kind, value in entries:
        out += _string(key)
        if isinstance(kind, tuple):
            out += struct.pack("<IIQ", ARRAY, kind[1], len(value)) + b"".join(_scalar(kind[1], v) for v in value)
        else:
            out += struct.pack("<I", kind) + _scalar(kind, value)
    with open(path, "wb") as file:
        file.write(out)
