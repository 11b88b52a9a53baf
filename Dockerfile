# The manager of fleets, installed from the wheel of this checkout:
#
#   docker build --tag agentfleet:0.1.0 .
#   docker run --read-only --tmpfs /tmp --volume fleet:/var/lib/agentfleet --publish 8080:8080 agentfleet:0.1.0
#
# docs/deployment.md tells what it writes, listens to and needs; tests/image runs these very steps.
ARG BASE=python:3.11-slim-bookworm

# ---------------------------------------------------------------------------------------------- the wheel, then a venv
FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
ARG EXTRAS=cli,jsonschema,kubernetes,server,sql

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python3 -m venv /build \
    && /build/bin/pip wheel --wheel-dir /wheels ".[${EXTRAS}]"

# a venv of its own, without pip: it is the same path in the image, because scripts name their interpreter
RUN python3 -m venv --without-pip /opt/agentfleet \
    && /build/bin/pip --python /opt/agentfleet/bin/python install --no-cache-dir --no-index --find-links /wheels \
       "agentfleet[${EXTRAS}]"

# ---------------------------------------------------------------------------------------------- what runs
FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="agentfleet" \
      org.opencontainers.image.description="Runs fleets of 1,000+ AI-agent instances" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"

# users by number, so that a kubelet can tell that none is root
RUN groupadd --gid 10001 agentfleet \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/agentfleet --shell /usr/sbin/nologin agentfleet \
    && install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/agentfleet
COPY --from=build /opt/agentfleet /opt/agentfleet

# the root file system may be read-only: bytecode was written above, and nothing but /tmp and the volume is written to
ENV PATH="/opt/agentfleet/bin:${PATH}" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PROMETHEUS_DISABLE_CREATED_SERIES=true \
    AGENTFLEET_DATABASE="sqlite:////var/lib/agentfleet/fleet.db" \
    AGENTFLEET_HOST="0.0.0.0" \
    AGENTFLEET_PORT="8080"
VOLUME ["/var/lib/agentfleet"]
WORKDIR /var/lib/agentfleet
EXPOSE 8080
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["/opt/agentfleet/bin/agentfleet", "alive"]
ENTRYPOINT ["/opt/agentfleet/bin/agentfleet"]
CMD ["serve"]
