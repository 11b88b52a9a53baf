"""DECIDE: every decision agentfleet makes, as pure functions.

Each module offers `decide(policy, observed, memory, now) -> (decision, memory)`. Nothing here reads a clock,
draws a random number, does I/O, logs, or knows asyncio; the same input gives the same output on any machine.
"""
