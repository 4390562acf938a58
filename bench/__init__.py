"""Side-by-side benchmarks of socket forwarders; run by ci/bench."""
