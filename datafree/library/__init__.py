"""The library: the whole flow on networks and images in memory, without files; `datafree.merge` and its neighbours."""
