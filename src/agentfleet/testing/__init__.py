"""What a user's own tests import: virtual time, faults, fixtures."""
