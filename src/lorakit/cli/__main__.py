"""`python -m lorakit.cli`: the command line where the `lorakit` script is not on the path."""

from lorakit.cli import main

main()
