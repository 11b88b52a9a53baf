"""OBSERVE: probes, heartbeats and metrics, beside what the backends report."""
