"""`python -m scrimp`."""

from scrimp.cli import main

main()
