"""Parts of benchmarks/router.py: the routers that are compared, their processes, and two C programs of ours."""
