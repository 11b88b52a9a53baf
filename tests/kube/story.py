"""A Deployment and a HorizontalPodAutoscaler written by hand, which the example fleet must become field for field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "kubernetes"

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata:
  name: ai-agent-cluster
  namespace: ai-agents
spec:
  replicas: 3
  selector:
    matchLabels:
      app: ai-agent
  template:
    metadata:
      labels:
        app: ai-agent
    spec:
      containers:
      - name: agent
        image: ai-agent:latest
        resources:
          requests:
            memory: "512Mi"
            cpu: "250m"
          limits:
            memory: "1Gi"
            cpu: "500m"
        readinessProbe:
          httpGet:
            path: /health
            port: 8080
        livenessProbe:
          httpGet:
            path: /health
            port: 8080
"""

AUTOSCALER = """
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: ai-agent-hpa
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: ai-agent-cluster
  minReplicas: 1
  maxReplicas: 10
  metrics:
  - type: Resource
    resource:
      name: cpu
      target:
        type: Utilization
        averageUtilization: 70
  - type: Resource
    resource:
      name: memory
      target:
        type: Utilization
        averageUtilization: 80
"""

DEFAULTS = {
    "spec.strategy.type": "RollingUpdate",
    "spec.strategy.rollingUpdate.maxSurge": "25%",
    "spec.strategy.rollingUpdate.maxUnavailable": "25%",
    "spec.minReadySeconds": 0,
    "spec.progressDeadlineSeconds": 600,
    "spec.revisionHistoryLimit": 10,
    "spec.paused": False,
    "spec.template.spec.terminationGracePeriodSeconds": 30,
    "spec.template.spec.serviceAccountName": "default",
    **{
        f"spec.template.spec.containers.0.{probe}Probe.{field}": value
        for probe in ("readiness", "liveness")
        for field, value in {
            "httpGet.scheme": "HTTP",
            "periodSeconds": 10,
            "timeoutSeconds": 1,
            "failureThreshold": 3,
            "successThreshold": 1,
        }.items()
    },
}
"""What the API server makes of fields that the Deployment above leaves out, and agentfleet says."""

PROFILE = {
    "spec.template.spec.securityContext.runAsNonRoot": True,
    "spec.template.spec.securityContext.seccompProfile.type": "RuntimeDefault",
    "spec.template.spec.containers.0.securityContext.allowPrivilegeEscalation": False,
    "spec.template.spec.containers.0.securityContext.capabilities.drop.0": "ALL",
    "spec.template.spec.containers.0.securityContext.readOnlyRootFilesystem": True,
    "spec.template.spec.containers.0.volumeMounts.0.name": "agentfleet-tmp",
    "spec.template.spec.containers.0.volumeMounts.0.mountPath": "/tmp",
    "spec.template.spec.volumes.0.name": "agentfleet-tmp",
    "spec.template.spec.volumes.0.emptyDir": {},
    "spec.template.spec.automountServiceAccountToken": False,
}
"""What the restricted profile adds."""

OURS = (
    "metadata.labels.",
    "spec.template.metadata.labels.",
    "spec.template.metadata.annotations.",
    "spec.template.spec.containers.0.env.",
    "spec.template.spec.containers.0.ports.0.",
)
"""What tells agents, people and Services whose instances these are, and where they answer."""


def read(text: str) -> dict[str, Any]:
    """A manifest from YAML."""
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Every value in a manifest, by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, Any] = {}
    for key, item in items:
        found |= leaves(item, f"{place}.{key}".lstrip("."))
    return found or {place: value}
