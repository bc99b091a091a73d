"""How like real images the proxies are, as far as the parents can tell."""
