"""`agentfleet demo`: a real fleet lives, is hurt and heals, in under two minutes.

Three kinds of processes: the *driver* (`driver`, what the command runs) starts the *manager* (`manager`, a `Fleet` with
a dispatcher and a scenario), kills it once and starts it again; the manager runs *workers* (`worker`). Whatever is
reported is computed afterwards from the journal and from what the workers noted down themselves (`report`).
"""
