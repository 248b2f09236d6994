"""A seeded simulation that judges the replication core: the very Follower and Leader, all else simulated."""
