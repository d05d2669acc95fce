import json
from pathlib import Path

import numpy as np
import pytest
import torch

import protocol
from protocol.codec_names import FLOAT_CODECS, INTEGER_CODECS
from protocol.errors import SFPromptError
from protocol.frames import Frame, decode_frame, encode_frame, join_frame
from tests.protocol_vectors import write

FOLDER = Path(protocol.__file__).with_name("vectors")

VECTORS = json.loads((FOLDER / "vectors.json").read_text(encoding="utf-8"))


def as_parameters(vectors):
    return [pytest.param(vector, id=vector["file"]) for vector in vectors]


@pytest.mark.parametrize("decode", [Frame.array, Frame.tensor])
@pytest.mark.parametrize("vector", as_parameters(VECTORS["valid"]))
def test_a_valid_vector_is_decoded(vector, decode):
    frame = decode_frame((FOLDER / vector["file"]).read_bytes())
    assert (frame.kind, frame.meta) == (vector["kind"], vector["meta"])
    assert list(frame.specs) == [tensor["name"] for tensor in vector["tensors"]]
    for tensor in vector["tensors"]:
        decoded = decode(frame, tensor["name"])
        assert list(decoded.shape) == tensor["shape"]
        assert decoded.flatten().tolist() == tensor["values"]


@pytest.mark.parametrize("to_array", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("vector", as_parameters(v for v in VECTORS["valid"] if v["canonical"]))
def test_a_canonical_vector_is_encoded_to_the_same_bytes(vector, to_array):
    tensors = {}
    for tensor in vector["tensors"]:
        wide = np.int64 if tensor["codec"] == "int64" else np.float64
        source = tensor.get("input", tensor["values"])
        values = np.array(source, wide).reshape(tensor["shape"])
        tensors[tensor["name"]] = (to_array(values), tensor["codec"])
    data = join_frame(encode_frame(vector["kind"], vector["meta"], tensors))
    assert data == (FOLDER / vector["file"]).read_bytes()


@pytest.mark.parametrize(
    ("writable", "decode"),
    [(bytes, Frame.arrays), (bytes, Frame.tensors), (bytearray, Frame.arrays)],
)
@pytest.mark.parametrize("vector", as_parameters(VECTORS["invalid"]))
def test_an_invalid_vector_is_refused_with_its_code(vector, writable, decode):
    with pytest.raises(SFPromptError) as caught:
        decode(decode_frame(writable((FOLDER / vector["file"]).read_bytes())))
    assert caught.value.code == vector["code"]
    assert caught.value.field is not None
    json.dumps(caught.value.to_wire(), allow_nan=False)


def test_every_codec_has_vectors():
    names = {tensor["codec"] for vector in VECTORS["valid"] for tensor in vector["tensors"]}
    bases = {name.partition(":")[0] for name in (*FLOAT_CODECS, *INTEGER_CODECS)}
    assert {name.removesuffix("+zstd").partition(":")[0] for name in names} == bases
    assert any(name.endswith("+zstd") for name in names)


def test_the_script_writes_the_stored_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "FOLDER", tmp_path)
    write.main()
    fresh = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert fresh == {path.name: path.read_bytes() for path in FOLDER.iterdir()}
