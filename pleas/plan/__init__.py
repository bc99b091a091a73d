"""Which units are fused: what it costs, what it saves, and how every widened axis is laid out."""
