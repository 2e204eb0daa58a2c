"""SFT → expert iteration → GRPO on GSM8K, on one node, readable in an evening."""

__version__ = "0.1.0"
