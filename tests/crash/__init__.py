"""What the crash tests share: a model of acknowledged writes, a client that keeps to it, fio, offline comparison."""
