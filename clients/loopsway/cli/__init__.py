"""The `loopsway` command: train, build, inspect, serve, query, demo.

What an extra brings is imported inside the functions that need it, so that `loopsway --help` is quick and a base
install can say which extra is missing.
"""
