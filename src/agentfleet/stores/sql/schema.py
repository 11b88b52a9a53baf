"""The tables. `migrations/` makes them; a test holds both to each other."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

NEWEST = "0007"
"""Number of the migration that makes these tables."""
METADATA = MetaData()

CLUSTER_CONFIG = Table(
    "cluster_config",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("cluster_name", String(255), nullable=False),
    Column("namespace", String(255), nullable=False),
    Column("min_replicas", Integer, server_default="1"),
    Column("max_replicas", Integer, server_default="10"),
    Column("target_cpu_percent", Integer, server_default="70"),
    Column("target_memory_percent", Integer, server_default="80"),
    Column("health_check_config", JSON().with_variant(JSONB, "postgresql")),
    Column("created_at", DateTime(timezone=True)),
)
"""A fleet, as its user asks for it (F18)."""

AGENT_INSTANCES = Table(
    "agent_instances",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("cluster_id", Uuid, ForeignKey("cluster_config.id")),
    Column("instance_id", String(255), nullable=False),
    Column("status", String(50), nullable=False),
    Column("node_name", String(255)),
    Column("cpu_usage", Float),
    Column("memory_usage", Float),
    Column("last_heartbeat", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True)),
    Column("version", Text),
    Column("revision", BigInteger),
    Column("health", String(50)),
    Column("restarts", Integer, nullable=False, server_default="0"),
    Column("config_revision", BigInteger),
    Column("detail", Text),
    Index("agent_instances_by_cluster", "cluster_id", "instance_id"),
)
"""Its instances as they were last seen (F18), and what a console wants to know besides."""

FLEETS_HEAD = Table(
    "fleets_head",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("last", BigInteger, nullable=False),
)
"""One row, which counts the changes of fleets and operations: they become visible in the order of their numbers."""

FLEETS = Table(
    "fleets",
    METADATA,
    Column("id", Uuid, ForeignKey("cluster_config.id"), primary_key=True),
    Column("name", String(253), nullable=False, unique=True),
    Column("spec", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("deleting", Boolean, nullable=False),
    Column("status", Text),
    Column("status_at", Double),
    Column("change", BigInteger, nullable=False, index=True),
)
"""What managers keep of a fleet beside `cluster_config`."""

OPERATIONS = Table(
    "operations",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("seq", BigInteger, nullable=False, unique=True),
    Column("fleet", Uuid, nullable=False),
    Column("name", String(253), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("arguments", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("key", Text),
    Column("created_at", Double, nullable=False),
    Column("status", String(20), nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("outcome", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("change", BigInteger, nullable=False, index=True),
    Index("operations_by_fleet", "fleet", "seq"),
    Index("operations_by_key", "actor", "key", unique=True),
)
"""What was asked of fleets, and what came of it. The fleet may be gone."""

MANAGERS = Table(
    "managers",
    METADATA,
    Column("identity", String(253), primary_key=True),
    Column("beats", BigInteger, nullable=False),
    Column("about", Text, nullable=False),
)
"""Who manages; whoever is there counts its beats up."""

CHANGES = Table(
    "changes",
    METADATA,
    Column("key", Text, primary_key=True),
    Column("number", BigInteger, nullable=False, index=True),
)
"""What has changed last, for those who wait in other processes; used in SQLite alone, which notifies nobody."""

FENCES = Table(
    "fences",
    METADATA,
    Column("fleet", Text, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
)
"""The highest epochs in which leaders have written: events by their fleet's name, rollouts of configuration by
"config:" and the key, all else by the fleet's id. Never one row for events and something else, because the journal
blocks its process while it waits, and what it waits for must not be that process's own."""

CONFIG_HEADS = Table(
    "config_heads",
    METADATA,
    Column("key", String(253), primary_key=True),
    Column("newest", BigInteger, nullable=False),
)
"""The newest revision of each key: what writers compare and set."""

CONFIG_REVISIONS = Table(
    "config_revisions",
    METADATA,
    Column("key", String(253), primary_key=True),
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("author", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("restores", BigInteger),
    Column("origin", Text, nullable=False, server_default=text("''")),
    Column("previous", String(64), nullable=False, server_default=text("''")),
    Column("rollout", Text, nullable=False, server_default=text("''")),
    Column("base", BigInteger, nullable=False, server_default=text("0")),
    Column("request", String(64), nullable=False, server_default=text("''")),
    Index("config_revisions_by_request", "key", "request"),
)

CONFIG_ROLLOUTS = Table(
    "config_rollouts",
    METADATA,
    Column("key", String(253), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("base", BigInteger, nullable=False),
    Column("phase", String(20), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("body", Text, nullable=False),
)
"""How far the newest rollout of each key in steps has come; its leader compares and sets the version."""

CONFIG_ACK_HEADS = Table(
    "config_ack_heads",
    METADATA,
    Column("key", String(253), primary_key=True),
    Column("newest", BigInteger, nullable=False),
)
"""Number of the newest batch of each key; who writes holds it, so that batches become visible in their order."""

CONFIG_ACKS = Table(
    "config_acks",
    METADATA,
    Column("key", String(253), primary_key=True),
    Column("instance", String(253), primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("refused", BigInteger, nullable=False),
    Column("why", Text, nullable=False),
    Column("via", String(20), nullable=False),
    Column("at", Double, nullable=False),
    Column("batch", BigInteger, nullable=False),
    Index("config_acks_by_batch", "key", "batch"),
)
"""What each instance has said that it runs."""

JOURNAL_HEAD = Table(
    "journal_head",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("last", BigInteger, nullable=False),
    Column("trimmed", BigInteger, nullable=False),
)
"""One row. Who appends holds it until the commit, so that events become visible in the order of their numbers."""

JOURNAL = Table(
    "journal",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("fleet", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("line", Text, nullable=False),
    Index("journal_by_fleet", "fleet", "seq"),
)

JOURNAL_STATES = Table(
    "journal_states",
    METADATA,
    Column("fleet", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("line", Text, nullable=False),
)
"""The last event of each state, which outlives the trimming of the journal."""

LEASES = Table(
    "leases",
    METADATA,
    Column("name", String(253), primary_key=True),
    Column("uid", String(36), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("holder", Text),
    Column("epoch", BigInteger, nullable=False),
    Column("duration", Double, nullable=False),
)

API_TOKENS = Table(
    "api_tokens",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("digest", String(64), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("fleets", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", Double),
    Column("used_at", Double),
    Column("revoked_at", Double),
)
"""Tokens of the REST API; of their secrets the SHA-256 alone. Revoked ones stay."""

API_AUDIT_HEAD = Table(
    "api_audit_head",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("last", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("refused", String(64), nullable=False, server_default=text("''")),
)
"""One row: place of the newest entry of the audit, hashes of the newest that was done and of the newest refused."""

API_AUDIT = Table(
    "api_audit",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", Text, nullable=False),
    Column("credential", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("request", Text, nullable=False),
    Column("method", String(10), nullable=False),
    Column("path", Text, nullable=False),
    Column("fleet", Text),
    Column("operation", Text),
    Column("status", Integer, nullable=False),
    Column("detail", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("refused", Boolean, nullable=False, server_default=false()),
    Index("api_audit_by_fleet", "fleet", "seq"),
    Index("api_audit_by_chain", "refused", "seq"),
)
"""Who asked the REST API for which change, and what came of it; each row with the hash of the one before in its chain:
of what was refused, or of all else (and of refusals that were written before there were two)."""
