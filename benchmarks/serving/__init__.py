"""Parts of benchmarks/serve.py: prompts, one request, arrivals, summaries. They know no server but by its URL."""
