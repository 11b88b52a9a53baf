"""RECORD: the journal and the configuration stores."""
