"""Pretrained backbones: architecture, weights, image preparation."""
