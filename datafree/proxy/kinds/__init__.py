"""The kinds of proxies, one file each, and what only they need."""
