"""Baselines by plain back-propagation: what the PEFT library puts into a base model."""
