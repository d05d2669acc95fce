"""Offsite-tuning: LoRA on the ends of a proxy with fewer blocks."""
