"""vlm-sft: fine-tune vision-language models to answer questions about images."""

__version__ = "0.1.0"
