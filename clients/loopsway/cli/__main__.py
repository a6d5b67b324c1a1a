"""`python -m loopsway.cli`: the same as the `loopsway` script, where no script is on the path."""

from .main import main

main()
