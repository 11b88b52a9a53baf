"""agentfleet runs fleets of AI-agent instances: deploy, scale, watch, heal, upgrade, configure."""
