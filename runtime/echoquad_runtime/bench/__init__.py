"""Benchmarks of a bundle on this host: latency, throughput and memory, and the plot of the latencies."""
