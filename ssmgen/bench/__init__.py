"""Measure kernels on one GPU: what is run, on what, how it is timed, and what is said of it.

Nothing here is imported by the road, or by ``import ssmgen``.
"""
