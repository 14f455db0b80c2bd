"""Models: loading, LoRA, shared-image attention, the embedded base."""
