"""A network of namespaces, to hold the twin's network model against real bytes without a cluster. See docs/netlab.md."""
