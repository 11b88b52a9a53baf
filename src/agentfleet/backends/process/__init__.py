"""Instances as operating-system processes of this machine: the embedded default. Nothing else is needed."""

from agentfleet.backends.process.backend import ProcessBackend

__all__ = ["ProcessBackend"]
