"""The figures that agentfleet is measured by; `make bench` runs them all."""
