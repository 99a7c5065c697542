"""The safety audit: what refuses and why, what gets around it, what was planted, and what hardening changes."""
