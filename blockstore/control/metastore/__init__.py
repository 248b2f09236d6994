"""Where the control plane keeps its records: one interface, and what implements it."""
