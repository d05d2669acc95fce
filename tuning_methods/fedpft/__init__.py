"""FedPFT: LoRA on a pruned proxy of the backbone."""
