import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import protocol

EXPORTED = {
    "architecture": "Architecture Rotary",
    "arrays": "Array Backend Device Generator NUMPY SomeArray as_numpy backend_of backend_on "
    "chunks widen",
    "base": "Message extract_field extract_limit",
    "codec_names": "CodecParts FLOAT_CODECS LOSSLESS_SUFFIX INTEGER_CODECS check_float_codec "
    "is_row_wise_inside parse_codec",
    "codecs": "BFloat16 Buffer CODECS Codec Compressed Cosine ErrorFeedback FixedSizeCodec "
    "Float16 Float32 Int4 Int4Asymmetric Int64 Int8 Klt ProductQuantiser RawCodec Svd TopK UInt8 "
    "encoded_bytes get_codec",
    "command": "Subcommand group_of read_token_file run_command version_option",
    "errors": "Busy Conflict DamagedFile DamagedFrame EmptyUpdate FieldValue Forbidden "
    "IdempotencyKeyReused InternalError "
    "InvalidField InvalidRequest MalformedFrame NonFinite NotFound RefusedByDevice Removed "
    "RunClosed SFPromptError StaleRound StepLost TooLarge Unauthorized UnknownCodec Unreachable "
    "UnsupportedVersion WrongShape error_from_wire",
    "combinations": "list_refusals",
    "labels": "LabelUse SHARED label_epsilon",
    "federation": "AggregationRule FederationSettings ServerOptimizer",
    "presets": "FORMS Form over_form",
    "method": "Fields GROUP MethodSettings installed_method_names load_class "
    "method_class method_names parse_method register",
    "settings": "RunSettings refuse_moved",
    "frames": "ALIGNMENT Frame MAGIC PREFIX_BYTES decode_frame encode_frame "
    "frame_length header_length join_frame require_kind",
    "header": "check_text pack_header unpack_header",
    "limits": "DEFAULT_LIMITS FrameLimits MIB",
    "messages": "Absence Assignment BlobRef BodyStepMeta BytesByPhase Count EvaluationReport Event "
    "ExchangeMeta InferMeta JoinRequest JoinResponse Loss MAX_LOSS ParticipantView Results "
    "RoundStatus RoundView RunStatus RunView "
    "SAMPLE_ID_BYTES SamplesMeta Seconds Sha256 StartMeta StepId StepMeta Task UpdateMeta "
    "UpdateReceipt parse_message",
    "nearest": "nearest_field nearest_name",
    "quality": "CONFIDENCE_BINS ClassQuality ConfidenceBin DeviceQuality EvaluationView MAX_CELLS "
    "PredictionCounts Quality",
    "run_state": "DeviceState DeviceStatus RunState",
    "seeds": "derive_seed",
    "parts": "BackboneSettings ClassName CodecName Fit Text TrainingSettings WireSettings",
    "plan": "ModelPlan PromptDepth PromptPlacement PruningScore RunPlan TrainingPlan "
    "Tuned WirePlan",
    "traffic": "Phase Traffic get_phases total_bytes",
    "torch_arrays": "TorchBackend",
    "tensor_specs": "TensorSpec read_spec",
    "tls": "create_ssl_context",
    "untyped": "STATUS_FIELD describe_request is_typed untyped_error",
    "checksums": "JSONChecksum Pieces",
    "printable": "printable printable_lines",
    "wire": "BACKWARD_PATH CHECKSUM_HEADER EXCHANGE_PATH FLOAT32_BYTES FORWARD_PATH "
    "FRAME_MEDIA_TYPE IDEMPOTENCY_HEADER INFER_PATH LABELS_PATH MISSING_PATH "
    "PROTOCOL_VERSION REQUEST_ID_HEADER SAMPLES_PATH SOLVE_PATH START_PATH VERSION_HEADER",
}

FOLDER = Path(protocol.__file__).parent


@pytest.mark.parametrize("module", EXPORTED)
def test_a_module_exports_exactly_this(module):
    loaded = importlib.import_module(f"protocol.{module}")
    assert sorted(loaded.__all__) == sorted(EXPORTED[module].split())
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_every_module_is_listed():
    assert {path.stem for path in FOLDER.iterdir() if path.suffix == ".py"} - {"__init__"} == set(
        EXPORTED
    ) - {"codecs"}


def loaded_by(*modules):
    lines = [*(f"import protocol.{module}" for module in modules), "import sys"]
    code = "; ".join([*lines, "print(*{name.split('.')[0] for name in sys.modules})"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER.parent
    )
    return set(done.stdout.split())


def test_plans_and_errors_load_without_torch():
    light = loaded_by("errors", "plan", "messages", "limits", "seeds", "traffic", "wire")
    assert light.isdisjoint(["torch", "numpy"])


def test_frames_codecs_and_pruning_work_where_torch_is_not_installed():
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "timm", "torchvision", "sklearn"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np
import protocol.codecs, protocol.frames
from protocol.codec_names import FLOAT_CODECS, INTEGER_CODECS

EXAMPLES = {"topk:F": "topk:0.5", "cosine:S": "cosine:4", "svd:E": "svd:0.9", "klt:Q": "klt:0.5"}
numbers = np.random.default_rng(1).standard_normal((8, 5, 64)).astype(np.float32)
for name in (*FLOAT_CODECS, *INTEGER_CODECS):
    codec = EXAMPLES.get(name, name)
    array = np.arange(9) if name in INTEGER_CODECS else numbers
    pieces = protocol.frames.encode_frame("update", {}, {"x": (array, codec)})
    frame = protocol.frames.decode_frame(protocol.frames.join_frame(pieces))
    error = np.linalg.norm(frame.array("x") - array) / np.linalg.norm(array)
    print(codec, error, flush=True)
    assert error < 0.6, codec

import pruning

logits, labels = numbers[:, 0], np.arange(8) % 3
for score in pruning.SCORES.values():
    scores = score(logits, labels, logits, np.random.default_rng(2))
    assert len(pruning.select_highest(scores, 0.5, labels, per_class=True)) == 5
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER.parent
    )
    assert done.returncode == 0, done.stderr
