"""Write all files of protocol/vectors: python -m tests.protocol_vectors.write"""

import json
from pathlib import Path

from tests.protocol_vectors.by_hand import UNIT_BUFFER, frame
from tests.protocol_vectors.refused import INVALID, INVALID_CODECS
from tests.protocol_vectors.valid import LOSSY, OTHER_ORDER, VALID

FOLDER = Path(__file__).parents[2] / "protocol" / "vectors"


def describe(name, head, values, canonical, source=None):
    tensors = [
        {
            "name": tensor["name"],
            "codec": tensor["codec"],
            "shape": tensor["shape"],
            "values": numbers,
        }
        for tensor, numbers in zip(head["tensors"], values, strict=True)
    ]
    if source is not None and source != values[0]:
        tensors[0]["input"] = source
    return {
        "file": f"{name}.bin",
        "canonical": canonical,
        "kind": head["kind"],
        "meta": head["meta"],
        "tensors": tensors,
    }


def main():
    FOLDER.mkdir(exist_ok=True)
    for stale in FOLDER.glob("*.bin"):
        stale.unlink()
    valid, invalid = [], []
    for name, head, buffers, values in VALID:
        (FOLDER / f"{name}.bin").write_bytes(frame(head, buffers))
        valid.append(describe(name, head, values, canonical=True))
    for name, (head, buffers), values, source in LOSSY:
        (FOLDER / f"{name}.bin").write_bytes(frame(head, buffers))
        valid.append(describe(name, head, [values], canonical=source is not None, source=source))
    (FOLDER / "other-order.bin").write_bytes(frame(OTHER_ORDER, [UNIT_BUFFER]))
    valid.append(describe("other-order", OTHER_ORDER, [[1.0]], canonical=False))
    for name, data, code, why in INVALID:
        (FOLDER / f"invalid-{name}.bin").write_bytes(data)
        invalid.append({"file": f"invalid-{name}.bin", "code": code, "why": why})
    for name, (head, buffers), why in INVALID_CODECS:
        code = "unknown_codec" if name.startswith("name-") else "malformed_frame"
        (FOLDER / f"invalid-{name}.bin").write_bytes(frame(head, buffers))
        invalid.append({"file": f"invalid-{name}.bin", "code": code, "why": why})
    content = {"version": 2, "valid": valid, "invalid": invalid}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (FOLDER / "vectors.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
