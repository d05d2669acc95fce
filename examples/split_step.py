"""One split training step without a server: head and tail on the device, body on the other side.

A small vision transformer with random weights is cut in three. Soft prompts and tail are tuned on
one batch; only smashed data, features and their gradients cross the two cuts. Nothing is
downloaded.

    python examples/split_step.py
"""
# ruff: noqa: T201

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protocol.plan import ModelPlan, TrainingPlan
from split_model.backbone.architecture import skeleton
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.state import initial_state, tail_tensors
from split_model.optimizer import make_optimizer
from split_model.parts.build import build_body, build_head, build_tail

PLAN = ModelPlan(
    backbone="vit_tiny_patch16_224", image_size=64, cut=2, num_classes=4, prompt_count=5
)

TRAINING = TrainingPlan(prompt_learning_rate=0.02, tail_learning_rate=0.005)

STEPS = 10


def main() -> None:
    """Cut the model, check the cut, then tune prompts and tail for a few steps."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = prepare_backbone(PLAN, "random:0", Path(folder))
        weights = dict(open_backbone(file.path))
    state = initial_state(PLAN, weights, seed=0)
    head = build_head(PLAN, weights)
    body = build_body(PLAN, weights)
    tail = build_tail(PLAN, tail_tensors(state))
    prompts = nn.Parameter(state["prompts"])
    images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 4  # [B, 3, S, S], [B]

    uncut = skeleton(PLAN)  # timm's whole model
    uncut.load_state_dict({**weights, **tail_tensors(state)}, assign=True)
    with torch.no_grad():
        error = (tail(body(head(images))) - uncut(images)).abs().max().item()
    print(f"tail(body(head(x))) equals the uncut model: {error < 1e-5} (error {error:.1e})")

    optimizer = make_optimizer(TRAINING, prompts, tail)
    for step in range(STEPS):
        loss = split_step((head, body, tail), prompts, images, labels)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:2d}: loss {loss:.4f}")


def split_step(
    parts: tuple[nn.Module, ...], prompts: Tensor, images: Tensor, labels: Tensor
) -> float:
    """One forward and backward pass across both cuts; returns the loss."""
    head, body, tail = parts
    smashed = head(images, prompts)  # device: [B, T, D]
    received = smashed.detach().requires_grad_()  # crosses the first cut
    features = body(received)  # server: [B, T, D]
    leaf = features.detach().requires_grad_()  # crosses the second cut
    loss = F.cross_entropy(tail(leaf), labels)  # device
    loss.backward()
    features.backward(leaf.grad)  # server
    smashed.backward(received.grad)  # device: the gradient reaches the prompts
    return loss.item()


if __name__ == "__main__":
    main()
