"""Offsite-tuning: LoRA on the end blocks of a proxy with fewer blocks."""
