"""`python -m blockstore.cli` is `cairn`: how `cairn up` starts its processes, whatever PATH says."""

from blockstore.cli.main import main

main()
