"""OBSERVE and ACT: where instances live. `base` holds the contract."""
