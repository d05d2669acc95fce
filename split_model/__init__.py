"""A timm backbone cut in head, body and tail, with soft prompts."""

from importlib import metadata

from split_model.backbone.architecture import Anatomy, anatomy, body_blocks, skeleton
from split_model.backbone.weights import BackboneFile, open_backbone, prepare_backbone
from split_model.checkpoints.export import ExportedModel, TunedModel, export_model, load_exported
from split_model.checkpoints.head_file import head_weights, read_head_file, write_head_file
from split_model.checkpoints.metadata import ImagePreparation, image_preparation
from split_model.checkpoints.state import (
    BODY,
    TunedState,
    applied,
    apply_state,
    body_tensors,
    check_device_state,
    device_shapes,
    difference,
    head_tensors,
    initial_state,
    is_server_side,
    load_state,
    read_body,
    read_state,
    save_state,
    state_bytes,
    state_shapes,
    tail_tensors,
)
from split_model.errors import (
    ModelPlanError,
    PackagedBackboneError,
    TensorFileError,
    TokenCountError,
    UnsupportedBackboneError,
    WeightsMismatchError,
    WeightSourceError,
)
from split_model.layers.bfloat16 import activation_dtype
from split_model.layers.prompts import prompt_shape
from split_model.optimizer import learning_rate_factor, make_optimizer, set_progress
from split_model.parts.body import Body
from split_model.parts.build import Layered, build_body, build_head, build_tail, build_tunable_body
from split_model.parts.cost import PartBytes, part_bytes
from split_model.parts.depths import feature_shape, read_blocks, read_tokens
from split_model.parts.head import Head
from split_model.parts.tail import Tail, for_the_tail, needed_tokens

__all__ = [
    "BODY",
    "Anatomy",
    "BackboneFile",
    "Body",
    "ExportedModel",
    "Head",
    "ImagePreparation",
    "Layered",
    "ModelPlanError",
    "PackagedBackboneError",
    "PartBytes",
    "Tail",
    "TensorFileError",
    "TokenCountError",
    "TunedModel",
    "TunedState",
    "UnsupportedBackboneError",
    "WeightSourceError",
    "WeightsMismatchError",
    "activation_dtype",
    "anatomy",
    "applied",
    "apply_state",
    "body_blocks",
    "body_tensors",
    "build_body",
    "build_head",
    "build_tail",
    "build_tunable_body",
    "check_device_state",
    "device_shapes",
    "difference",
    "export_model",
    "feature_shape",
    "for_the_tail",
    "head_tensors",
    "head_weights",
    "image_preparation",
    "initial_state",
    "is_server_side",
    "learning_rate_factor",
    "load_exported",
    "load_state",
    "make_optimizer",
    "needed_tokens",
    "open_backbone",
    "part_bytes",
    "prepare_backbone",
    "prompt_shape",
    "read_blocks",
    "read_body",
    "read_head_file",
    "read_state",
    "read_tokens",
    "save_state",
    "set_progress",
    "skeleton",
    "state_bytes",
    "state_shapes",
    "tail_tensors",
    "write_head_file",
]

try:
    __version__ = metadata.version("sfprompt")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
