"""The offload side: fits adapters from adaptation data, knowing nothing of the base model."""
