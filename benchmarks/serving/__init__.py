"""Parts of benchmarks/serve.py: prompts, one request, arrivals, summaries. They know servers by URL only."""
